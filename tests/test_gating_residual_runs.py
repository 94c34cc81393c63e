"""Routers that see the layer before in real runs: sharded, split, compiled, recomputed, resumed.

The first run saves what three steps made of a model: then its maps are not zero. Every other run
begins from that, with other maps of ranks, and has the losses and gradients of the plain one.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dialect import LENGTH, ON_0_2, SINCE_2026_08
from run_trainer import digest
from trainer_runs import EP_2, Runs, at_once, compare_gradients, door_1, job_folder

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host

# The last layer is dense, and so is one between those with experts, which differ in number.
FLAVOR = """
inherits = "tiny"
n_layers = 5
moe_layers = [0, 2, 3]
num_experts = [4, 8, 8]
router_top_k = 2
n_heads = 4
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
"""
SAME = ["--same-sequences", "--training.global-batch-size", "4"]
AOT = ["--compile.enable", "--compile.backend", "aot_eager"]
TP_2 = ["--parallelism.tensor-parallel-degree", "2"]

TOKENS = 4 * LENGTH
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

SPLIT = {
    "expert parallel, microbatches, full": ([*at_once(1), *EP_2], "full"),
    "fully sharded, microbatches, full": ([*at_once(1)], "full"),
    "expert parallel, compiled, selective": ([*EP_2, *AOT], "selective"),
    "tensor parallel, full": (TP_2, "full"),
    "tensor parallel, DTensor": ([*TP_2, *EP_2[2:]], "none"),
    "tensor and expert parallel": (
        [*TP_2, *EP_2, "--parallelism.no-enable-sequence-parallel"],
        "none",
    ),
    "all DTensor, selective": (["--parallelism.spmd-backend", "full_dtensor"], "selective"),
}
IN_SHORT = ("expert parallel, microbatches", "tensor parallel, full")
"""Under expert parallelism all else is fully sharded; ``test_compiled_layers.py`` compiles."""
EVERY_SPLIT = [
    pytest.param(name, marks=() if name.startswith(IN_SHORT) else pytest.mark.full)
    for name in SPLIT
]

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("residual"))
    (folder / "host.toml").write_text(FLAVOR)
    (folder / "residual.toml").write_text(f"{FLAVOR}[router]\ngating_residual = true\n")
    return folder


def saved(folder: Path) -> str:
    return str(folder / "saved" / "checkpoint" / "step-3")


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    runs.add("host", door_1(folder, "host", *SAME, "--training.steps", "1"))
    save = ["--checkpoint.enable", "--checkpoint.last-save-model-only", "--dump-folder"]
    runs.add("first", door_1(folder, "residual", *SAME, *save, str(folder / "saved")))
    start = ["--checkpoint.enable", "--checkpoint.load-only"]
    start += ["--checkpoint.initial-load-path", saved(folder)]
    runs.add("plain", door_1(folder, "residual", *SAME, *start))
    for name, (flags, checkpointing) in SPLIT.items():
        job = door_1(folder, "residual", *SAME, *start, *flags, checkpointing=checkpointing)
        runs.add(name, job, ranks=2)
    return runs


def test_the_first_step_is_the_hosts(runs):
    """Loss and every gradient that the host has, to the last bit."""
    (theirs,), (first,) = runs["host"], runs["first"]
    assert first["losses"][0] == theirs["losses"][0]
    for name, gradient in theirs["gradients"].items():
        assert torch.equal(first["gradients"][name], gradient), name


def test_a_checkpoint_has_the_maps(runs, folder):
    """With the names of a model that was not split, and what a run begins with is in it."""
    (first,), (plain,) = runs["first"], runs["plain"]
    model = host().build_on_meta(load_flavor("residual", near=folder)).to_empty(device="cpu")
    dcp.load(state := dict(model.named_parameters()), checkpoint_id=saved(folder), no_dist=True)
    assert {name: digest(each.detach()) for name, each in state.items()} == first["parameters"]
    maps = [each for name, each in state.items() if ".residual." in name]
    assert [tuple(each.shape) for each in maps] == [(8, 4), (8, 8)]
    assert all(each.all() for each in maps)
    assert plain["losses"][0] < first["losses"][-1]


@pytest.mark.parametrize("split", EVERY_SPLIT)
def test_gradients_are_those_of_one_rank(runs, split):
    runs["first"]  # which saves what they begin from
    (plain,), (of_rank, _) = runs["plain"], runs[split]
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    assert max(differences.values()) <= TOKENS * 2.0**-24
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)
