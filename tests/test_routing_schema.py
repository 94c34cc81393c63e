"""A flavor file's [router], [balance] and [telemetry]: what they may say, inherit and not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ezpz_moe.errors import EzpzError
from ezpz_moe.flavors import Flavor, load_flavor
from ezpz_moe.routing_schema import Balance, Router, Schedule, Telemetry

EVERYTHING = """
[router]
routing = "topk"
jitter_noise = 0.02
gate_precision = "float64"
freeze = true
activation = "relu_rmsnorm"
pad_token_id = 0
dispatch_padding = false
null_experts = 2
copy_experts = 1
constant_experts = 3
top_k = 5
[router.temperature]
start = 2.0
end = 0.5
steps = 1000
shape = "cosine"
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
"""


def load(folder: Path, text: str, *, inherits: str = "debugmodel", name: str = "mine") -> Flavor:
    """The flavor of this text; the debug model has 8 experts, of which a token uses 3."""
    (folder / f"{name}.toml").write_text(f'inherits = "{inherits}"\n{text}')
    return load_flavor(name, near=folder)


def said(folder: Path, text: str, *, inherits: str = "debugmodel") -> str:
    """What is wrong with a flavor of this text, without the folder's name."""
    with pytest.raises(EzpzError) as error:
        load(folder, text, inherits=inherits)
    return str(error.value).replace(f"{folder}/", "")


# What may be said ---------------------------------------------------------------------------------


def test_a_flavor_without_the_tables_routes_as_the_host_does(tmp_path: Path) -> None:
    flavor = load(tmp_path, "")
    assert (flavor.router, flavor.balance, flavor.telemetry) == (Router(), Balance(), None)
    assert load(tmp_path, "[telemetry]").telemetry == Telemetry()


def test_the_defaults() -> None:
    """Written down twice: nothing else can tell a slip from what was meant."""
    one = {"start": 1.0, "end": 1.0, "steps": 1, "shape": "linear"}
    router = ("topk", 0, None, False, one, "identity", None, True, 0, 0, 0, None, 1e-4, 100, 0, 0)
    assert tuple(Router().to_dict().values()) == router
    assert tuple(Balance().to_dict().values()) == (0, 0, 0, "sequence", None, None)
    assert tuple(Telemetry().to_dict().values()) == (100, 2, 0.25, None, "brief", True)


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
        "dispatch_padding": False,
        "null_experts": 2,
        "copy_experts": 1,
        "constant_experts": 3,
        "top_k": 5,
    }
    assert flavor.router.zero_computation_experts == 6
    assert flavor.router.temperature == Schedule(start=2.0, end=0.5, steps=1000, shape="cosine")
    assert flavor.balance == Balance(
        aux_loss=0.01,
        mse_loss=1.0,
        z_loss=0.001,
        scope="global",
        bias_update="proportional",
        bias_rate=Schedule(start=0.01, end=0.0001, steps=50, shape="exponential"),
    )
    assert flavor.telemetry is not None
    assert tuple(flavor.telemetry.model_dump().values()) == (7, 1.5, 0.5, 5, "per_expert", False)
    assert tuple(flavor.telemetry.thresholds.model_dump().values()) == (7, 1.5, 0.5)


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
    "text",
    [
        '[router]\nrouting = "sinkhorn"\n[balance]\nz_loss = 0.1\nbias_update = "sign"',
        '[router]\nrouting = "balanced"\n[balance]\nbias_update = "none"\naux_loss = 0',
        '[router]\nrouting = "sinkhorn"\njitter_noise = true',
        '[balance]\nbias_update = "none"\nbias_rate = 0.1',
        "[router]\nfreeze = true\n[balance]\naux_loss = 0.1",
    ],
)
def test_what_goes_together(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


# Inheritance --------------------------------------------------------------------------------------


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
    rate = Schedule(start=0.5, end=0.5, steps=1)
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
        "parent.toml: router.temperature: the key steps is missing; a schedule is given as a "
        "whole.",
        "parent.toml: unknown key 'router.temperature.step'. Did you mean 'steps'?",
        "parent.toml: router.activation = 'relu': should be 'identity', 'softplus' or "
        "'relu_rmsnorm'.",
        "mine.toml: router.pad_token_id = -1: should be greater than or equal to 0.",
        "parent.toml: balance.aux_loss = -1: should be greater than or equal to 0.",
        "mine.toml: balance.z_loss = -1: should be greater than or equal to 0.",
    ]


# What may not be said -----------------------------------------------------------------------------

NOT_NEGATIVE = "should be greater than or equal to 0."
SCHEDULE = "should be a number above 0, or a table of start, end and steps."


@pytest.mark.parametrize(
    ("table", "text", "shown", "message"),
    [
        ("router", 'routing = "sinkhron"', "'sinkhron'", None),
        ("router", "jitter_noise = 1", "1", "should be less than 1."),
        ("router", "jitter_noise = -0.1", "-0.1", NOT_NEGATIVE),
        ("router", "jitter_noise = nan", "nan", "should be a finite number."),
        ("router", 'jitter_noise = "some"', "'some'", "should be a valid number."),
        (
            "router",
            'gate_precision = "fp32"',
            "'fp32'",
            "should be 'bfloat16', 'float32' or 'float64'.",
        ),
        ("router", "freeze = 1", "1", "should be a valid boolean."),
        ("router", "temperature = 0", "0", SCHEDULE),
        ("router", "temperature = -1.5", "-1.5", SCHEDULE),
        ("router", "temperature = inf", "inf", SCHEDULE),
        ("router", "temperature = nan", "nan", SCHEDULE),
        ("router", "temperature = true", "True", SCHEDULE),
        ("router", 'temperature = "hot"', "'hot'", SCHEDULE),
        ("router", "pad_token_id = -1", "-1", NOT_NEGATIVE),
        ("router", "pad_token_id = 1.0", "1.0", "should be a valid integer."),
        ("router", "dispatch_padding = 0", "0", "should be a valid boolean."),
        ("router", "null_experts = -1", "-1", NOT_NEGATIVE),
        ("router", "copy_experts = -1", "-1", NOT_NEGATIVE),
        ("router", "constant_experts = 16385", "16385", "should be less than or equal to 16384."),
        ("router", "top_k = 0", "0", "should be greater than or equal to 1."),
        ("router", "sinkhorn_tolerance = 0", "0", "should be greater than 0."),
        ("router", "sinkhorn_iterations = 0", "0", "should be greater than or equal to 1."),
        ("router", "noise = 1.5", "1.5", "should be less than or equal to 1."),
        ("router", "noise = -0.5", "-0.5", NOT_NEGATIVE),
        ("router", "skip_first_n_experts = -1", "-1", NOT_NEGATIVE),
        ("balance", "aux_loss = -0.1", "-0.1", NOT_NEGATIVE),
        ("balance", "mse_loss = -1", "-1", NOT_NEGATIVE),
        ("balance", "z_loss = inf", "inf", "should be a finite number."),
        ("balance", "z_loss = true", "True", "should be a valid number."),
        ("balance", 'scope = "rank"', "'rank'", "should be 'sequence', 'batch' or 'global'."),
        ("balance", "bias_rate = 0", "0", SCHEDULE),
        ("telemetry", "every = 0", "0", "should be greater than or equal to 1."),
        ("telemetry", 'images = "png"', "'png'", "should be a valid boolean."),
        ("telemetry", "alert_dead_steps = 0", "0", "should be greater than or equal to 1."),
        ("telemetry", "alert_cv_rise = 1", "1", "should be greater than 1."),
        ("telemetry", "alert_collapse = 1.0", "1.0", "should be less than 1."),
        ("telemetry", "alert_collapse = 0", "0", "should be greater than 0."),
    ],
)
def test_a_value_of_the_wrong_kind(
    tmp_path: Path, table: str, text: str, shown: str, message: str | None
) -> None:
    message = message or "should be 'topk', 'sinkhorn' or 'balanced'. Did you mean 'sinkhorn'?"
    key = text.partition(" ")[0]
    expected = f"mine.toml: {table}.{key} = {shown}: {message}"
    assert said(tmp_path, f"[{table}]\n{text}") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("router = 3", "router = 3: should be a table."),
        ("balance = []", "balance = []: should be a table."),
        ('[router]\nrooting = "topk"', "unknown key 'router.rooting'. Did you mean 'routing'?"),
        ("[balance]\naux_los = 1", "unknown key 'balance.aux_los'. Did you mean 'aux_loss'?"),
        ("[telemetry]\nevry = 1", "unknown key 'telemetry.evry'. Did you mean 'every'?"),
        (
            "[router]\ntemperature = { start = 1, end = 0, steps = 2 }",
            "router.temperature.end = 0: should be greater than 0.",
        ),
        (
            "[router]\ntemperature = { start = 1, end = 2, steps = 0 }",
            "router.temperature.steps = 0: should be greater than or equal to 1.",
        ),
        (
            '[balance]\nbias_rate = { start = 1, end = 2, steps = 2, shape = "cosin" }',
            "balance.bias_rate.shape = 'cosin': should be 'linear', 'exponential' or 'cosine'. "
            "Did you mean 'cosine'?",
        ),
        (
            "[balance]\nbias_rate = { start = 1, steps = 2 }",
            "balance.bias_rate: the key end is missing; a schedule is given as a whole.",
        ),
    ],
)
def test_a_key_that_is_not_there_or_not_a_table(tmp_path: Path, text: str, message: str) -> None:
    assert said(tmp_path, text) == f"mine.toml: {message}"


BALANCED = '[router]\nrouting = "balanced"\n'
SINKHORN = '[router]\nrouting = "sinkhorn"\n'


def no_effect_balanced(what: str) -> str:
    return (
        f'router.routing = "balanced" does not choose by the scores: {what} would have no effect. '
        'Remove it; if it is inherited, set a loss to 0 and bias_update to "none".'
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"{SINKHORN}[balance]\naux_loss = 0.01\nmse_loss = 0.1",
            'router.routing = "sinkhorn" excludes balance.aux_loss = 0.01 and balance.mse_loss = '
            "0.1: its assignment is doubly stochastic, so it is balanced already. Remove the loss "
            '(set it to 0 if it is inherited), or route with "topk".',
        ),
        (
            f"{BALANCED}[balance]\naux_loss = 0.01",
            no_effect_balanced("balance.aux_loss = 0.01"),
        ),
        (
            f'{BALANCED}[balance]\nz_loss = 0.1\nbias_update = "sign"',
            no_effect_balanced('balance.z_loss = 0.1 and balance.bias_update = "sign"'),
        ),
        (
            f'{BALANCED}[balance]\nbias_update = "proportional"',
            no_effect_balanced('balance.bias_update = "proportional"'),
        ),
        (
            "[balance]\nbias_rate = 0.01",
            '[balance] bias_rate has no effect without bias_update = "sign" or "proportional"; set '
            "it, or remove bias_rate.",
        ),
        (
            "[router]\nnoise = 0.5",
            '[router] noise = 0.5 has no effect with routing = "topk", only with "balanced"; '
            "remove it, or if it is inherited set noise = 0.0 and skip_first_n_experts = 0.",
        ),
        (
            f"{BALANCED}sinkhorn_tolerance = 0.1\nsinkhorn_iterations = 5",
            "[router] sinkhorn_tolerance = 0.1 and sinkhorn_iterations = 5 has no effect with "
            'routing = "balanced", only with "sinkhorn"; remove it, or if it is inherited set '
            "sinkhorn_tolerance = 0.0001 and sinkhorn_iterations = 100.",
        ),
        (
            f"{BALANCED}jitter_noise = true",
            '[router] jitter_noise = 0.01 has no effect with routing = "balanced", which has its '
            "own noise; remove it, or if it is inherited set it to 0.",
        ),
        (
            f"{SINKHORN}null_experts = 1\nconstant_experts = 2",
            '[router] null_experts = 1 and constant_experts = 2 needs routing = "topk", not '
            '"sinkhorn".',
        ),
        (
            f"{BALANCED}copy_experts = 1",
            '[router] copy_experts = 1 needs routing = "topk", not "balanced".',
        ),
        (
            "[router]\ntop_k = 6",
            "[router] top_k = 6 is for zero-computation experts only; without them the model's own "
            "top-k stands (router_top_k).",
        ),
        (
            "[router]\ndispatch_padding = false",
            "[router] dispatch_padding = false needs pad_token_id, which says what padding is.",
        ),
        (
            "[router]\nnull_experts = 2\ntop_k = 11",
            "router.top_k = 11 exceeds the 10 experts that there are: 8 routed and 2 "
            "zero-computation ones.",
        ),
        (
            f"{BALANCED}skip_first_n_experts = 6",
            "router.skip_first_n_experts = 6 leaves 2 of 8 experts, but a token uses 3.",
        ),
        (
            f"{BALANCED}skip_first_n_experts = 9",
            "router.skip_first_n_experts = 9 leaves 0 of 8 experts, but a token uses 3.",
        ),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, text: str, message: str) -> None:
    assert said(tmp_path, text) == f"mine.toml: {message}"


def test_all_that_does_not_go_together_is_said_at_once(tmp_path: Path) -> None:
    message = said(tmp_path, "[router]\nnoise = 0.5\ntop_k = 5\ndispatch_padding = false")
    assert len(message.splitlines()) == 1
    for part in ("noise = 0.5 has no effect", "top_k = 5 is for", "dispatch_padding = false needs"):
        assert part in message
