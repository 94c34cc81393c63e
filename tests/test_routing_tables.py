"""A flavor's [router], [balance] and [telemetry]: what they may say, and inherit."""

from __future__ import annotations

from pathlib import Path

import pytest
from flavor_files import load, said

from ezpz_moe.config.routing_schema import Balance, Router
from ezpz_moe.config.schedule_schema import Rate, Schedule
from ezpz_moe.config.telemetry_schema import Dump, Telemetry

EVERYTHING = """
[router]
routing = "topk"
jitter_noise = 0.02
gate_precision = "float64"
freeze = true
activation = "relu_rmsnorm"
pad_token_id = 0
padding = "trailing"
dispatch_padding = false
null_experts = 2
copy_experts = 1
constant_experts = 3
top_k = 5
keep_top1_score = true
[router.temperature]
start = 2.0
end = 0.5
steps = 1000
shape = "cosine"
[router.similarity]
strength = 0.5
window = 32
temperature = 0.25
[balance]
aux_loss = 0.01
mse_loss = 1
z_loss = 1e-3
scope = "global"
bias_update = "proportional"
bias_rate = { start = 1e-2, end = 1e-4, steps = 50, shape = "exponential" }
[telemetry]
every = 5
detail = "per_expert"
images = false
alert_dead_steps = 7
alert_cv_rise = 1.5
alert_collapse = 0.5
pairs = 256
dump = { every = 10, what = ["probabilities", "ids"] }
"""


def test_a_flavor_without_the_tables_routes_as_the_host_does(tmp_path: Path) -> None:
    flavor = load(tmp_path, "")
    assert (flavor.router, flavor.balance, flavor.telemetry) == (Router(), Balance(), None)
    assert load(tmp_path, "[telemetry]").telemetry == Telemetry()


def test_the_defaults() -> None:
    """Written down twice: nothing else can tell a slip from what was meant."""
    one = {"start": 1.0, "end": 1.0, "steps": 1, "shape": "linear"}
    none = dict.fromkeys(("aux_loss", "mse_loss", "z_loss", "locality_loss", "chunk_loss"), 0)
    router = ("topk", 0, None, False, one, "identity", False, None, "token", None)
    router += (0, 0, 0, None, False)
    router += ({"strength": 0, "window": 64, "temperature": 0.2}, 1e-4, 100, 0, 0, False)
    assert tuple(Router().to_dict().values()) == router
    assert tuple(Balance().to_dict().values()) == (
        *(0, 0, 0, 0, 0, "sequence", none, none, none, None, 64, 0, "last", 1, None, None),
    )
    assert tuple(Telemetry().to_dict().values()) == (100, 2, 0.25, None, "brief", True, 0, None)


def test_every_key_is_what_the_file_says(tmp_path: Path) -> None:
    flavor = load(tmp_path, EVERYTHING)
    router = flavor.router.model_dump(exclude={"temperature"}, exclude_unset=True)
    assert router == {
        "routing": "topk",
        "jitter_noise": 0.02,
        "gate_precision": "float64",
        "freeze": True,
        "activation": "relu_rmsnorm",
        "pad_token_id": 0,
        "padding": "trailing",
        "dispatch_padding": False,
        "null_experts": 2,
        "copy_experts": 1,
        "constant_experts": 3,
        "top_k": 5,
        "keep_top1_score": True,
        "similarity": {"strength": 0.5, "window": 32, "temperature": 0.25},
    }
    assert flavor.router.zero_computation_experts == 6
    assert flavor.router.temperature == Schedule(start=2.0, end=0.5, steps=1000, shape="cosine")
    assert flavor.balance == Balance(
        aux_loss=0.01,
        mse_loss=1.0,
        z_loss=0.001,
        scope="global",
        bias_update="proportional",
        bias_rate=Rate(start=0.01, end=0.0001, steps=50, shape="exponential"),
    )
    assert flavor.telemetry is not None
    dump = Dump(every=10, what=("probabilities", "ids"))
    in_order = Telemetry.model_fields
    assert tuple(getattr(flavor.telemetry, key) for key in in_order) == (
        *(7, 1.5, 0.5, 5, "per_expert", False, 256, dump),
    )
    assert flavor.telemetry.dumped == dump
    assert tuple(flavor.telemetry.thresholds.model_dump().values()) == (7, 1.5, 0.5)


def test_a_dump_is_inherited_as_a_whole_and_switched_off_by_nothing_in_it(tmp_path: Path) -> None:
    load(tmp_path, EVERYTHING, name="parent")
    text = "[telemetry]\ndump = {{ every = 5, what = [{}] }}"
    child = load(tmp_path, text.format('"ids"'), inherits="parent").telemetry
    assert child is not None
    assert (child.every, child.dump) == (5, Dump(every=5, what=("ids",)))
    off = load(tmp_path, text.format(""), inherits="parent").telemetry
    assert off is not None
    assert off.dumped is None


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("jitter_noise = true", {"jitter_noise": 0.01}),
        ("jitter_noise = false", {"jitter_noise": 0.0}),
        ("jitter_noise = 0", {"jitter_noise": 0.0}),
        ("temperature = 2", {"temperature": Schedule(start=2.0, end=2.0, steps=1)}),
        (
            'routing = "sinkhorn"\nsinkhorn_tolerance = 0.01\nsinkhorn_iterations = 1',
            {"routing": "sinkhorn", "sinkhorn_tolerance": 0.01, "sinkhorn_iterations": 1},
        ),
        (
            'routing = "balanced"\nnoise = 1\nskip_first_n_experts = 5',
            {"routing": "balanced", "noise": 1.0, "skip_first_n_experts": 5},
        ),
        ("null_experts = 8\ntop_k = 16", {"null_experts": 8, "top_k": 16}),
    ],
)
def test_short_forms_and_the_ends_of_ranges(tmp_path: Path, text: str, changed: dict) -> None:
    router = load(tmp_path, f"[router]\n{text}").router
    assert router == Router().model_copy(update=changed)


@pytest.mark.parametrize(
    ("text", "has_losses"),
    [("", False), ("aux_loss = 0.1", True), ("mse_loss = 0.1", True), ("z_loss = 0.1", True)],
)
def test_what_has_losses(tmp_path: Path, text: str, has_losses: bool) -> None:
    assert load(tmp_path, f"[balance]\n{text}").balance.has_losses is has_losses


@pytest.mark.parametrize(
    ("text", "of_scopes"),
    [
        ("", {"sequence": {}}),
        ('scope = "global"', {"global": {}}),
        ('aux_loss = 0.1\nscope = "batch"', {"batch": {"aux_loss": 0.1}}),
        ("[balance.batch]\naux_loss = 0.1", {"batch": {"aux_loss": 0.1}}),
        (
            "z_loss = 1\n[balance.global]\naux_loss = 0.1\n[balance.batch]\nmse_loss = 2",
            {"sequence": {"z_loss": 1}, "batch": {"mse_loss": 2}, "global": {"aux_loss": 0.1}},
        ),
        (
            "[balance.sequence]\naux_loss = 0.1\nz_loss = 1",
            {"sequence": {"aux_loss": 0.1, "z_loss": 1}},
        ),
    ],
)
def test_losses_by_scope(tmp_path: Path, text: str, of_scopes: dict) -> None:
    balance = load(tmp_path, f"[balance]\n{text}").balance
    assert balance.of_scopes == of_scopes
    assert balance.has_losses is any(of_scopes.values())
    assert "global" in balance.to_dict()  # as in the file


def test_a_table_of_a_scope_is_inherited_key_by_key(tmp_path: Path) -> None:
    load(tmp_path, "[balance.batch]\naux_loss = 0.1\nz_loss = 1", name="parent")
    child = load(tmp_path, "[balance.batch]\naux_loss = 0.2", inherits="parent")
    assert child.balance.of_scopes == {"batch": {"aux_loss": 0.2, "z_loss": 1}}
    reset = load(tmp_path, "[balance.batch]\naux_loss = 0\nz_loss = 0", inherits="parent")
    assert not reset.balance.has_losses


def test_tables_are_inherited_key_by_key_and_a_schedule_as_a_whole(tmp_path: Path) -> None:
    parent = load(tmp_path, EVERYTHING, name="parent")
    text = (
        "[router]\njitter_noise = 0\n[router.temperature]\nstart = 3\nend = 1\nsteps = 2\n"
        '[balance]\nbias_rate = 0.5\n[telemetry]\ndetail = "brief"'
    )
    child = load(tmp_path, text, inherits="parent")
    schedule = Schedule(start=3.0, end=1.0, steps=2)  # linear, not the parent's cosine
    changed = {"jitter_noise": 0.0, "temperature": schedule}
    assert child.router == parent.router.model_copy(update=changed)
    rate = Rate(start=0.5, end=0.5, steps=1)
    assert child.balance == parent.balance.model_copy(update={"bias_rate": rate})
    assert parent.telemetry is not None
    assert child.telemetry == parent.telemetry.model_copy(update={"detail": "brief"})


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        (
            '[router]\nrouting = "balanced"\nnoise = 0.5\nskip_first_n_experts = 1',
            '[router]\nrouting = "topk"\nnoise = 0\nskip_first_n_experts = 0',
        ),
        (
            '[router]\nrouting = "sinkhorn"\nsinkhorn_tolerance = 1e-3',
            '[router]\nrouting = "topk"\nsinkhorn_tolerance = 1e-4',
        ),
        (
            "[router]\njitter_noise = true\nnull_experts = 2\n[balance]\naux_loss = 0.1\n"
            'z_loss = 0.1\nbias_update = "sign"\nbias_rate = 0.1',
            '[router]\nrouting = "balanced"\njitter_noise = false\nnull_experts = 0\n'
            '[balance]\naux_loss = 0\nz_loss = 0\nbias_update = "none"',
        ),
    ],
)
def test_what_excludes_another_routing_can_be_undone_in_a_child(
    tmp_path: Path, parent: str, child: str
) -> None:
    """An inherited key can only be set to its default, so the default must be as good as none."""
    load(tmp_path, parent, name="parent")
    load(tmp_path, child, inherits="parent")


def test_a_mistake_is_found_in_the_file_that_makes_it(tmp_path: Path) -> None:
    text = (
        '[router]\nactivation = "relu"\n[router.temperature]\nstart = 1\nend = 0\nstep = 3\n'
        "[balance]\naux_loss = -1"
    )
    (tmp_path / "parent.toml").write_text(f'inherits = "debugmodel"\n{text}')
    child = "[router]\npad_token_id = -1\n[balance]\nz_loss = -1"
    assert said(tmp_path, child, inherits="parent").splitlines() == [
        "parent.toml: router.temperature.end = 0: should be greater than 0.",
        "parent.toml: router.temperature: the key steps is missing; a schedule must be complete.",
        "parent.toml: unknown key 'router.temperature.step'. Did you mean 'steps'?",
        "parent.toml: router.activation = 'relu': should be 'identity', 'softplus' or "
        "'relu_rmsnorm'.",
        "mine.toml: router.pad_token_id = -1: should be greater than or equal to 0.",
        "parent.toml: balance.aux_loss = -1: should be greater than or equal to 0.",
        "mine.toml: balance.z_loss = -1: should be greater than or equal to 0.",
    ]
