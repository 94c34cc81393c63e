"""A run goes on from a checkpoint with its experts in another order as if nothing had happened."""

from __future__ import annotations

import random
from pathlib import Path

import dialect
import pytest
import torch
from checkpoint_cases import assert_same_checkpoint
from trainer_runs import EP_2, Runs, door_1, job_folder

from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.expert_order import inverse, read_order
from ezpz_moe.tools.checkpoints.reordering import permute_experts

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(dialect.ON_0_2, reason="the flavor needs torchtitan 0.3 or later"),
]

# All that has a row for each expert, and moments in training. The bias moves so fast that it
# decides which experts are chosen.
FLAVOR = """
inherits = "tiny"
attention = "sdpa"
compute_backend = "for_loop"
num_experts = [4, 8]
router_top_k = 2
router_bias = true
expert_bias = true
[router]
gating_residual = true
null_experts = 1
constant_experts = 1
[balance]
bias_update = "sign"
bias_rate = 0.03
"""
SAVED, STEPS = 3, 8
EXPERTS = {1: 4, 2: 8}
PLACES = {"EP 1": ["--checkpoint.load-only"], "EP 2": EP_2}
"""Two ranks: with the experts of both in FSDP's shards, or each with its own, which also saves."""


class Placed(Runs):
    """A run of two ranks that each have half of the experts, and what goes on from its step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(job_folder(folder))
        self.folder = folder
        (folder / "placed.toml").write_text(FLAVOR)
        saving = ["--checkpoint.enable", "--training.steps", str(STEPS)]
        interval = ["--checkpoint.interval", str(SAVED)]
        self.add("whole", door_1(folder, "placed", *saving, *interval, *EP_2), ranks=2)
        for name, flags in PLACES.items():
            self.add(name, door_1(folder, "placed", *saving, *flags), ranks=2)

    def step(self, name: str, step: int = SAVED) -> Path:
        return self.folder / name / "checkpoint" / f"step-{step}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Placed:
    runs = Placed(tmp_path_factory.mktemp("placed"))
    assert runs["whole"]
    draw = random.Random(0)
    order = {layer: draw.sample(range(number), number) for layer, number in EXPERTS.items()}
    for name in PLACES:
        permute_experts(runs.step("whole"), runs.step(name), order)
    return runs


@pytest.mark.parametrize("name", PLACES)
def test_the_next_losses_are_the_same(runs, name) -> None:
    for after, whole in zip(runs[name], runs["whole"], strict=True):
        assert len(after["losses"]) == STEPS - SAVED
        torch.testing.assert_close(after["losses"], whole["losses"][SAVED:], rtol=1e-5, atol=0)


def test_a_later_step_leads_back_to_the_first_numbers(runs, tmp_path) -> None:
    """And is placed again: the two orders are composed."""
    assert runs["EP 2"]
    later, order = runs.step("EP 2", STEPS), read_order(runs.step("EP 2"))
    assert order
    assert inspect(later).reordered == tuple(order)
    assert read_order(later) == order
    permute_experts(later, tmp_path / "back", inverse(order))
    assert read_order(tmp_path / "back") == {}


def test_shards_of_two_ranks_are_undone_bit_for_bit(runs, tmp_path) -> None:
    permute_experts(runs.step("EP 2"), tmp_path / "back", inverse(read_order(runs.step("EP 2"))))
    entries = storage.read_metadata(runs.step("whole")).state_dict_metadata
    stack = entries["layers.2.moe.routed_experts.inner_experts.w1_EFD"]
    assert [chunk.sizes[0] for chunk in stack.chunks] == [4, 4], "each rank has saved its experts"
    assert_same_checkpoint(runs.step("whole"), tmp_path / "back")
    # A shard is saved without what lay beside it in memory.
    assert inspect(tmp_path / "back").bytes == inspect(runs.step("whole")).bytes
