"""Which experts stay, how others are merged into them, and what stands for those that go."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from ezpz_moe.cli.pruned import Prune
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.config.toml import read_toml
from ezpz_moe.routing.gate import constant_output
from ezpz_moe.tools.analysis.similarity import cosines
from ezpz_moe.tools.pruning import merging
from ezpz_moe.tools.pruning.choice import least_alike, most_important
from ezpz_moe.tools.pruning.constants import Constant, Sample, constant_for
from ezpz_moe.tools.pruning.layers import Layer
from ezpz_moe.tools.pruning.merging import Merged
from ezpz_moe.tools.pruning.prune import _of_constants
from ezpz_moe.tools.pruning.settings import write_flavor, write_job

E, F, D = 5, 6, 4
SHAPES = {
    "w1_EFD": (E, F, D),
    "w2_EDF": (E, D, F),
    "w3_EFD": (E, F, D),
    "b1_EF": (E, F),
    "b2_ED": (E, D),
    "b3_EF": (E, F),
}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("amounts", "keep", "groups", "kept"),
    [
        ([0.1, 0.4, 0.2, 0.3], 2, 1, [1, 3]),
        ([0.2, 0.2, 0.4, 0.2], 2, 1, [0, 2]),  # the first of equal ones
        ([0.5, 0.4, 0.0, 0.1], 2, 2, [0, 3]),  # one of each group
    ],
)
def test_those_with_most_stay(amounts, keep, groups, kept) -> None:
    assert most_important(amounts, keep, groups) == kept


def test_of_the_two_most_alike_the_less_distinct_goes() -> None:
    angles = torch.tensor([0.0, 0.1, 0.5, 3.0], dtype=torch.float64)
    alike = torch.cos(angles[:, None] - angles)
    # 0 and 1 are nearest, and 1 is nearer to 2; then 0 and 2, of which 2 is nearer to 3.
    assert least_alike(alike, 3) == [0, 2, 3]
    assert least_alike(alike, 2) == [0, 3]
    # 0 and 1 are one group, 2 and 3 another.
    assert least_alike(torch.cos(angles[:, None] - angles), 2, groups=2) == [0, 3]
    nothing = alike.clone()
    nothing[3] = nothing[:, 3] = torch.nan  # an expert whose weights are zero
    assert least_alike(nothing, 3) == [0, 1, 2]


def test_merging_with_itself_in_another_order_changes_nothing() -> None:
    """The channels of the removed expert are put in the order of the kept one's."""
    stacks = {name: drawn(*shape, seed=seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for name, stack in stacks.items():
        dim = SHAPES[name].index(F) if F in SHAPES[name] else None
        stack[4] = stack[1] if dim is None else stack[1].index_select(dim - 1, order)
    pair = Merged(4, into=1, share=0.25)
    similar = sum(merging.similar_channels({name: of}, pair) for name, of in stacks.items())
    pair = Merged(4, into=1, share=0.25, order=merging.greedy_order(similar))
    assert torch.equal(pair.order, order.argsort())
    for name, stack in stacks.items():
        merged = merging.merge(stack, name, [pair])
        torch.testing.assert_close(merged, stack, rtol=1e-15, atol=1e-15)


def test_rows_of_gate_and_up_in_turn_stay_pairs() -> None:
    """gpt_oss's first matrix: a channel is two of its rows."""
    rows = drawn(2, 2 * F, D)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    rows[1] = rows[0].unflatten(0, (-1, 2))[order].flatten(0, 1)
    found = merging.greedy_order(
        merging.similar_channels({"mlp1_weight_EGD": rows}, Merged(1, 0, 0.5))
    )
    assert torch.equal(found, order.argsort())
    merged = merging.merge(rows, "mlp1_weight_EGD", [Merged(1, 0, 0.5, found)])
    torch.testing.assert_close(merged, rows, rtol=1e-15, atol=1e-15)


def test_a_mean_has_the_shares_of_its_experts() -> None:
    stack = drawn(E, F, D)
    alike = cosines([stack])
    nearest = {e: max((0, 2), key=lambda k, e=e: alike[e, k]) for e in (1, 3, 4)}
    pairs = merging.where_to([0, 2], alike, [0.1, 0.2, 0.3, 0.4, 0.0])
    assert {pair.expert: pair.into for pair in pairs} == {1: nearest[1], 3: nearest[3]}
    amounts = {e: (0.1, 0.2, 0.3, 0.4, 0.0)[e] for e in range(E)}
    merged = merging.merge(stack, "w1_EFD", pairs)
    for kept in (0, 2):
        of = [kept, *(pair.expert for pair in pairs if pair.into == kept)]
        wanted = sum(amounts[e] * stack[e] for e in of) / sum(amounts[e] for e in of)
        torch.testing.assert_close(merged[kept], wanted)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_channels_are_matched_once_each_the_nearest_first(size) -> None:
    similar = drawn(size, size, seed=size)
    order = merging.greedy_order(similar)
    assert sorted(order.tolist()) == list(range(size))
    # As one would do it by hand.
    rest, expected = similar.clone(), {}
    for _ in range(size):
        row, column = divmod(int(rest.argmax()), size)
        expected[row] = column
        rest[row], rest[:, column] = -torch.inf, -torch.inf
    assert order.tolist() == [expected[row] for row in range(size)]
    assert len(merging.greedy_order(torch.zeros(3, 3)).unique()) == 3  # all equal


def test_a_constant_expert_misses_least() -> None:
    x_nD, w_n = drawn(40, D) + 2, drawn(40, seed=1).abs()
    y_nD = drawn(40, D, seed=2) + 3

    def missing(mix_2D, vector_D) -> float:
        given = constant_output(x_nD, torch.ones(40, 1), mix_2D[None], vector_D[None])
        return (w_n[:, None] * (y_nD - given)).square().sum().item()

    found = constant_for(Sample(x_nD, w_n), y_nD, torch.zeros(D))
    assert found.missing == pytest.approx(missing(found.mix_2D, found.vector_D), rel=1e-12)
    assert found.output == pytest.approx((w_n[:, None] * y_nD).square().sum().item(), rel=1e-12)
    for dim, step in itertools.product(range(D), (-1e-3, 1e-3)):
        moved = found.vector_D.clone()
        moved[dim] += step
        assert missing(found.mix_2D, moved) > found.missing
    # What is constant is nearly all there: at the mean token, the token has a share of exp(-16).
    constant = constant_for(Sample(x_nD, w_n), torch.full((40, D), 3.0), torch.zeros(D))
    assert constant.missing < 1e-3 * constant.output


def test_an_expert_without_tokens_is_nearly_nothing() -> None:
    gate_D = drawn(D)
    found = constant_for(Sample(torch.zeros(0, D), torch.zeros(0)), torch.zeros(0, D), gate_D)
    x_D = 2 * gate_D  # a token that chooses it
    given = constant_output(x_D[None], torch.ones(1, 1), found.mix_2D[None], found.vector_D[None])
    assert given.abs().max() < 1e-3 * x_D.abs().max()


def test_constants_that_are_worse_than_nothing_are_said() -> None:
    def layer(missing: float) -> Layer:
        made = Constant(torch.zeros(2, D), torch.zeros(D), missing=missing, output=2.0)
        return Layer((0,), 2, 0.5, 0.5, (), (made,))

    command = Prune(Path("a"), Path("b"), "mine", 1, "weight", as_constant=True)
    assert command._row("layers.1", layer(0.5))["as constants"] == "75.0%"
    assert command._row("layers.1", layer(300.0))["as constants"] == "none"
    said = list(_of_constants({"layers.1": layer(0.5), "layers.2": layer(300.0)}))
    assert [each.partition(" are farther")[0] for each in said] == [
        "The constant experts of layer 2"
    ]
    assert not list(_of_constants({"layers.1": layer(0.5)}))


BASE = 'base = "qwen3/debugmodel_moe"\n'
SIZED = 'inherits = "debugmodel"\n'
ROUTER = """
[router]
temperature = { start = 2.0, end = 1.0, steps = 10 }
null_experts = 2
similarity = { strength = 0.1 }
[balance]
sequence = { aux_loss = 0.01 }
global = { z_loss = 1e-7 }
"""


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (BASE, {}),
        (BASE + "[change]\nrouter_route_norm = true\n", {}),
        (SIZED + ROUTER, {"top_k": 4}),
    ],
)
def test_the_flavor_says_all_that_its_parents_say(tmp_path, text, changed) -> None:
    """In a folder of its own, and everything but the number of experts is the same."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mine.toml").write_text(text)
    (tmp_path / "out").mkdir()
    flavor = load_flavor("mine_sdpa_for_loop", near=tmp_path / "whole")
    write_flavor(flavor, tmp_path / "out", keep=5, choices={"layers.1": 4})
    (tmp_path / "whole" / "mine.toml").unlink()
    written = load_flavor("mine_5_experts", near=tmp_path / "out")
    assert (written.attention, written.compute_backend) == ("sdpa", "for_loop")
    if flavor.base is None:
        assert written.dimensions == flavor.dimensions.model_copy(update={"num_experts": 5})
    else:
        said = {} if flavor.change is None else flavor.change.values
        assert written.change.values == {**said, "num_experts": 5}
    assert written.router == flavor.router.model_copy(update=changed)
    assert written.balance == flavor.balance
    again = tmp_path / "again"
    again.mkdir()
    write_flavor(written, again, keep=4, choices={"layers.1": 4})
    assert [file.name for file in again.iterdir()] == ["mine_4_experts.toml"]


def test_the_job_keeps_settings_and_nothing_of_where_its_run_began(tmp_path) -> None:
    """Such as safetensors, a chosen step, and a folder with a run that would be resumed."""
    values = {
        "job.dump_folder": "./outputs/debug",
        "training.steps": 5,
        "checkpoint.interval": 3,
        "checkpoint.load_step": 2,
        "checkpoint.initial_load_path": "safetensors",
        "checkpoint.initial_load_in_hf": True,
        "checkpoint.initial_load_in_hf_quantized": True,
        "checkpoint.initial_load_model_only": False,
        "train_only.router": True,
    }
    (tmp_path / "mine_4_experts.toml").write_text(SIZED)
    flavor = load_flavor("mine_4_experts", near=tmp_path)
    write_job(Job("mine", values=values), flavor, tmp_path, tmp_path / "out")
    written = read_toml(tmp_path / "job.toml")
    path = str(tmp_path / "out")
    assert written["job"] == {"dump_folder": f"{path}/run"}
    assert written["training"] == {"steps": 5}
    assert written["checkpoint"] == {"enable": True, "initial_load_path": path, "interval": 3}
    assert "train_only" not in written
