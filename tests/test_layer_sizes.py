"""Experts whose sizes differ from layer to layer: what a flavor says, and the model of the host.

``pyramid`` has 4, 8 and 16 experts of 32, 48 and 64 hidden channels in its layers 1, 2 and 4 of
five, of which a token uses 1, 2 and 3. D = 64, and a shared FFN is twice as wide as an expert.
"""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dialect import ON_0_2
from flavor_files import load, said
from hypothesis import example, given
from hypothesis import strategies as st
from trainer_runs import TINY

from ezpz_moe import cli
from ezpz_moe.config.flavors import Dimensions, Flavor, load_flavor
from ezpz_moe.config.layer_sizes import Ramp, in_words, one_or_each
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan_0_2.since_0_3 import refuse_uneven_layers

on_0_3 = pytest.mark.skipif(ON_0_2, reason="layers of torchtitan 0.2 have one size")


def pyramid() -> Flavor:
    return load_flavor("pyramid", near=TINY)


def size_of(flavor: Flavor) -> Dimensions:
    assert flavor.dimensions is not None
    return flavor.dimensions


# What a flavor says -------------------------------------------------------------------------------

steps = st.integers(1, 64)


@given(steps, steps, steps, st.integers(2, 64))
@example(8, 1, 8, 3)  # 36 is as far from 32 as from 40
def test_a_ramp_is_the_nearest_multiple_to_the_line(
    step: int, first: int, last: int, layers: int
) -> None:
    ramp = Ramp(first=step * first, last=step * last, multiple_of=step)
    sizes = ramp.over(layers)
    assert (sizes[0], sizes[-1]) == (ramp.first, ramp.last)
    for layer, size in enumerate(sizes):
        exact = ramp.first + Fraction((ramp.last - ramp.first) * layer, layers - 1)
        assert size % step == 0
        assert -Fraction(step, 2) < size - exact <= Fraction(step, 2)  # halves go up
    assert all((b - a) * (last - first) >= 0 for a, b in pairwise(sizes))


def test_without_multiple_of_whatever_divides_the_ends_divides_all(tmp_path: Path) -> None:
    size = size_of(load(tmp_path, "num_experts = { first = 8, last = 64 }"))
    assert [of.num_experts for of in size.layer_sizes.values()] == [8, 24, 40, 48, 64]
    assert size.is_uneven


@pytest.mark.parametrize(
    ("said", "layers"),
    [
        ('moe_layers = "all"', [0, 1, 2, 3, 4, 5]),
        ("moe_layers = { every = 2 }", [1, 3, 5]),
        ("moe_layers = { every = 4 }", [3]),
        ("moe_layers = [0, 5]", [0, 5]),
        ("n_dense_layers = 4", [4, 5]),
    ],
)
def test_the_layers_that_have_experts(tmp_path: Path, said: str, layers: list[int]) -> None:
    """The parent says n_dense_layers, which a file with moe_layers does not inherit."""
    size = size_of(load(tmp_path, said))
    assert [*size.layer_sizes] == layers
    assert not size.is_uneven


def test_a_child_may_go_back_to_dense_layers_that_come_first(tmp_path: Path) -> None:
    load(tmp_path, "moe_layers = [5]", name="parent")
    child = size_of(load(tmp_path, "n_dense_layers = 2", inherits="parent"))
    assert [*child.layer_sizes] == [2, 3, 4, 5]


def test_a_list_and_ramps_go_over_the_layers_with_experts_alone() -> None:
    size = size_of(pyramid())
    assert size.layer_sizes == {1: (4, 1, 32), 2: (8, 2, 48), 4: (16, 3, 64)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_experts = [8, 8]", "num_experts lists 2 sizes, but 5 layers have experts: list 5"),
        ("num_experts = [8, 0, 8, 8, 8]", "num_experts.1 = 0: should be greater than or equal"),
        ("num_experts = [8, 8.5, 8, 8, 8]", "num_experts.1 = 8.5: should be a valid integer"),
        ("num_experts = { first = 8 }", "a table of first, last and perhaps multiple_of"),
        ("num_experts = { first = 8, last = 16, by = 2 }", "a table of first, last and perhaps"),
        ("num_experts = { first = 8, last = 0 }", "num_experts.last = 0: should be greater than"),
        (
            "num_experts = { first = 8, last = 36, multiple_of = 8 }",
            "last = 36 is no multiple of multiple_of = 8; change one",
        ),
        (
            "moe_layers = [2]\nnum_experts = { first = 8, last = 16 }",
            "num_experts goes from 8 to 16, but one layer alone has experts: write a number",
        ),
        ("moe_layers = [1, 6]", "moe_layers has layer 6, but the last of n_layers is 5"),
        ("moe_layers = [3, 1, 3]", "moe_layers repeats a layer or is out of order: write [1, 3]"),
        ("moe_layers = []", "moe_layers names none of the 6 layers, so no layer has experts"),
        ("moe_layers = { every = 7 }", "moe_layers names none of the 6 layers"),
        ("moe_layers = 2", 'should be "all", a list of layers such as [1, 3, 5], or { every = 2 }'),
        (
            'moe_layers = "every"',
            "moe_layers = 'every': should be \"all\", a list of layers such as [1, 3, 5], or "
            "{ every = 2 }.",
        ),
        (
            "moe_layers = [1]\nn_dense_layers = 1",
            "n_dense_layers (1) and moe_layers both say which layers have experts. Remove one",
        ),
        ("router_top_k = [1, 9, 1, 1, 1]", "(9) must not exceed num_experts (8) in layer 2"),
        (
            "num_experts = [8, 8, 8, 12, 8]\n"
            "router_num_expert_groups = 8\nrouter_num_limited_groups = 4",
            "num_experts (12) must be a multiple of router_num_expert_groups (8) in layer 4",
        ),
        (
            "num_experts = [8, 8, 16, 8, 8]\nrouter_top_k = [3, 3, 3, 3, 5]\n"
            "router_num_expert_groups = 4\nrouter_num_limited_groups = 2",
            "router_top_k (5) must not exceed the 4 experts of 2 groups in layer 5",
        ),
        (
            "num_experts = [8, 8, 8, 8, 4]\n[router]\n"
            'routing = "balanced"\nskip_first_n_experts = 2',
            "skip_first_n_experts = 2 leaves 2 of 4 experts, but a token uses 3 in layer 5",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(tmp_path: Path, text: str, message: str) -> None:
    found = said(tmp_path, text)
    assert found.startswith("mine.toml: ")
    assert message in found
    assert "\n" not in found


def test_neither_of_the_two_keys_is_said(tmp_path: Path) -> None:
    files = [TINY.parents[2] / "flavors" / f"{name}.toml" for name in ("debugmodel", "_mla")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    whole = [line for line in lines if not line.startswith(("inherits", "n_dense", "vocab"))]
    (tmp_path / "mine.toml").write_text("\n".join(["vocab_size = 8", *whole]))
    with pytest.raises(EzpzError, match=r"neither n_dense_layers nor moe_layers is set\. Set one"):
        load_flavor("mine", near=tmp_path)


def test_sizes_in_words() -> None:
    assert (one_or_each([8, 8]), one_or_each([64, 8])) == (8, (64, 8))
    assert (in_words(8), in_words((64, 8, 16))) == ("8", "8-64")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_experts = [8, 8, 8, 8, 4]", "num_experts, router_top_k and moe_hidden_dim: "),
        ("moe_layers = { every = 2 }", "moe_layers: dense layers that are not the first ones"),
        ("n_dense_layers = 2", None),
        ("moe_layers = [4, 5]", None),
        ('moe_layers = "all"', None),
    ],
)
def test_what_torchtitan_0_2_cannot_build(tmp_path: Path, text: str, message: str | None) -> None:
    size = size_of(load(tmp_path, text))
    if message is None:
        refuse_uneven_layers(size, "mine.toml")
        return
    with pytest.raises(EzpzError) as refused:
        refuse_uneven_layers(size, "mine.toml")
    assert str(refused.value).startswith(f"mine.toml: {message}")
    assert str(refused.value).endswith("or install torchtitan 0.3.")


# The host's model ---------------------------------------------------------------------------------

D, VOCABULARY = 64, 2048
FFN = 3 * D
"""Weights of an FFN for each of its hidden channels."""
ROUTED = FFN * (4 * 32 + 8 * 48 + 16 * 64)
USED = FFN * (1 * 32 + 2 * 48 + 3 * 64)
SHARED = FFN * 2 * (32 + 48 + 64)
DENSE = FFN * 128
# Queries of two heads, latents of rank 32 with rotated keys, their norm, keys and values, output.
ATTENTION = D * 2 * 32 + D * (32 + 16) + 32 + 32 * 2 * 32 + 2 * 16 * D
GATES = D * (4 + 8 + 16)
NORMS = (2 * 5 + 1) * D


def test_its_parameters_are_the_sum_by_hand() -> None:
    counted = counts_at_hand(pyramid())
    assert counted is not None
    rest = 5 * ATTENTION + 2 * DENSE + SHARED + GATES + NORMS + 2 * VOCABULARY * D
    assert (counted.total, counted.active) == (rest + ROUTED, rest + USED)
    assert (counted.num_experts, counted.top_k) == ((4, 8, 16), (1, 2, 3))
    assert counted.expert_hidden_dim == (32, 48, 64)


@on_0_3
def test_the_built_model_has_them_too() -> None:
    assert host().summarize(pyramid()) == counts_at_hand(pyramid())


@on_0_3
def test_a_layer_has_the_initial_values_of_its_depth() -> None:
    """Not those of the first layer of its size."""
    from torchtitan.models.common.param_init import depth_scaled_std

    from ezpz_moe.hosts.titan.models import host_spec

    layers = host_spec(pyramid()).model.layers
    assert [layer.moe is None for layer in layers] == [True, False, False, True, False]
    for depth, layer in enumerate(layers):
        ffn = layer.feed_forward or layer.moe.shared_experts
        for linear in (layer.attention.wo, ffn.w2):
            assert linear.param_init["weight"].keywords["std"] == depth_scaled_std(0.02, depth)


@on_0_3
def test_the_hosts_flops_have_the_active_parameters_of_every_layer() -> None:
    """By its formula: 6 FLOPs for each active weight but the embedding, and whole attention.

    It takes k / E of the first such layer, 1 / 4, for all: of 16 experts a token would use 4.
    """
    from ezpz_moe.hosts.titan.anatomy import anatomy

    seq_len, per_key = 32, 2 * (32 + 16)
    weights = 5 * ATTENTION + 2 * DENSE + SHARED + GATES + NORMS + VOCABULARY * D + USED
    found = anatomy(pyramid(), seq_len)
    assert found.host_flops == 6 * weights + 6 * 5 * per_key * seq_len
    assert found.computing_experts == (1 + 2 + 3) / 3


@on_0_3
def test_the_hosts_flops_round_the_use_beside_zero_computation_experts_once(tmp_path: Path) -> None:
    """By hand: of 7, 11 and 19 choices a token takes 2, 3 and 4, so of weights 68520.5.

    Rounded down for each of the nine matrices, they would be 68517.
    """
    from ezpz_moe.hosts.titan.anatomy import anatomy

    for file in ("pyramid", "tiny"):
        shutil.copy(TINY / f"{file}.toml", tmp_path)
    flavor = load(tmp_path, "[router]\nnull_experts = 3\n", inherits="pyramid")
    exact = FFN * (4 * 32 * Fraction(2, 7) + 8 * 48 * Fraction(3, 11) + 16 * 64 * Fraction(4, 19))
    routed = int(exact)
    assert routed == 68520
    gates = D * (7 + 11 + 19)
    weights = 5 * ATTENTION + 2 * DENSE + SHARED + gates + NORMS + VOCABULARY * D + routed
    seq_len, per_key = 32, 2 * (32 + 16)
    assert anatomy(flavor, seq_len).host_flops == 6 * weights + 6 * 5 * per_key * seq_len


@on_0_3
def test_the_bias_moves_as_the_hosts_hook_moves_it(tmp_path: Path) -> None:
    """Where layers have one size, so that the host's can do it: the same bits."""
    from torchtitan.components.optimizer import register_moe_load_balancing_hook

    from ezpz_moe.hosts.titan.models import model_spec
    from ezpz_moe.hosts.titan.router import moe_layers
    from ezpz_moe.hosts.titan.routing import _BiasUpdate

    flavor = load(tmp_path, "n_layers = 4\ndim = 32\n[telemetry]")
    hooks: list = []
    optimizers = SimpleNamespace(register_step_pre_hook=hooks.append)
    dims = SimpleNamespace(ep_enabled=False, tp=1, get_optional_mesh=lambda name: None)
    ours, hosts = (model_spec(flavor).model.build() for _ in range(2))
    update = _BiasUpdate([ours], dims, None, True)
    register_moe_load_balancing_hook(optimizers, [hosts], dims)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        for of_ours, of_host in zip(
            moe_layers([ours]).values(), moe_layers([hosts]).values(), strict=True
        ):
            counts_E = torch.randint(0, 9, (8,), generator=draw)
            of_ours.router.counts_E += counts_E
            of_host.tokens_per_expert_E += counts_E
        update()
        hooks[0]()
    for of_ours, of_host in zip(
        moe_layers([ours]).values(), moe_layers([hosts]).values(), strict=True
    ):
        assert torch.equal(of_ours.expert_bias_E, of_host.expert_bias_E)
        assert of_ours.expert_bias_E.abs().max() > 1e-3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of flavors with the pyramid."""
    for name in ("tiny", "pyramid"):
        shutil.copy(TINY / f"{name}.toml", tmp_path)
    monkeypatch.setenv("EZPZ_MOE_FLAVORS", str(tmp_path))
    return tmp_path


@on_0_3
def test_layers_of_many_kinds_are_compiled(folder: Path) -> None:
    """torch would end the run at the first kind beyond its limit, which is 8 by default."""
    from torch._dynamo import config
    from torch._dynamo.testing import CompileCounter

    from ezpz_moe.hosts.titan.compiling import make_room
    from ezpz_moe.hosts.titan.models import model_spec

    flavor = load(folder, 'attention = "sdpa"\ncompute_backend = "for_loop"', inherits="pyramid")
    model = model_spec(flavor).model.build()
    model.init_weights(buffer_device=torch.device("cpu"))
    tokens, counter = torch.zeros(1, 8, dtype=torch.int64), CompileCounter()
    with config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        make_room(size_of(flavor))
        assert config.recompile_limit >= 4, "three kinds with experts, and dense layers"
        for layer in model.layers.values():
            layer.compile(backend=counter, fullgraph=True)
        model(tokens, torch.arange(8).unsqueeze(0))
    assert counter.frame_count >= 4


@on_0_3
@pytest.mark.parametrize(
    ("degree", "layer", "nearest"),
    [
        (16, "the 12 experts of flavor 'mine' in layer 1 and those of 1 more", "4"),
        (6, "the 8 experts of flavor 'mine' in layer 2 and those of 1 more", "4"),
        (3, "the 8 experts of flavor 'mine' in layer 2 and those of 1 more", "2 and 4"),
    ],
)
def test_a_degree_that_some_layer_cannot_share(
    folder: Path, degree: int, layer: str, nearest: str
) -> None:
    """It has to divide what divides the experts of all layers."""
    from config_cases import conflict

    load(folder, "num_experts = [12, 8, 16]", inherits="pyramid")
    found = conflict("mine", parallelism__expert_parallel_degree=degree)
    assert f"expert_parallel_degree = {degree} does not divide {layer}. " in found
    assert f"The nearest that do: {nearest}." in found


@on_0_3
@pytest.mark.parametrize("key", ["initial_load_in_hf", "last_save_in_hf"])
def test_hugging_faces_format_is_refused_in_a_job(folder: Path, key: str) -> None:
    from config_cases import config, conflict

    values = {"checkpoint__enable": True, f"checkpoint__{key}": True}
    assert f"checkpoint.{key} = true: the layers of flavor 'pyramid'" in conflict(
        "pyramid", **values
    )
    assert config("tiny_sdpa", **values), "of one size"


@on_0_3
def test_a_remark_names_the_layers_that_it_is_about(folder: Path) -> None:
    """A token of layer 1 has one expert, so its normalized weight is always 1."""
    from config_cases import config

    load(folder, "router_route_norm = true", inherits="pyramid")
    (remark,) = host().remarks(config("mine"))
    assert remark.startswith("flavor 'mine': in layers.1 the gate learns nothing from the model's")


@on_0_3
def test_commands_print_a_range_and_each_layers_size(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["flavors"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " pyramid " in line)
    assert {"4-16", "1-3", "32-64"} <= set(line.split())
    assert cli.main(["show", "pyramid", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flavor"]["counted"]["num_experts"] == [4, 8, 16]
    assert cli.main(["new", str(folder / "my.toml"), "--flavor", "pyramid"]) == 0
    assert "\n#expert_parallel_degree = 4 " in (folder / "my.toml").read_text()
