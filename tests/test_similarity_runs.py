"""Scores averaged over similar tokens in real runs of the trainer: split, compiled, recomputed.

All of it at once, in as few runs as show it: every run trains on the same sequences and documents,
from the same initial values, so that each has the losses and gradients of the plain one.
"""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from dialect import LENGTH, ON_0_2, SINCE_2026_08
from run_trainer import digest
from trainer_runs import EP_2, Runs, at_once, compare_gradients, door_1, job_folder

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host

FLAVOR = """
inherits = "tiny"
n_layers = 2
n_heads = 4
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
[router.similarity]
strength = 0.5
window = 24
"""
SAME = ["--same-sequences", "--documents", "--training.global-batch-size", "4"]
AOT = ["--compile.enable", "--compile.backend", "aot_eager"]
TP_2 = ["--parallelism.tensor-parallel-degree", "2"]
PP_2 = [*at_once(4), "--parallelism.pipeline-parallel-degree", "2"]

TOKENS = 4 * LENGTH
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]

EXPERT_PARALLEL = "expert parallel, fully sharded, selective"
COMPILED = f"compiled, {EXPERT_PARALLEL}"
TENSOR_PARALLEL = "tensor parallel, full"
PIPELINE = "pipeline, full"
GATE = "layers.1.moe.router.gate.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("similarity"))
    (folder / "similar.toml").write_text(FLAVOR)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    runs.add("plain", door_1(folder, "similar", *SAME))
    for name, more in ((EXPERT_PARALLEL, []), (COMPILED, AOT)):
        job = door_1(folder, "similar", *SAME, *EP_2, *more, checkpointing="selective")
        runs.add(name, job, ranks=2)
    saved = ["--checkpoint.enable", "--dump-folder", str(folder / "saved")]
    job = door_1(folder, "similar", *SAME, *TP_2, *saved, checkpointing="full")
    runs.add(TENSOR_PARALLEL, job, ranks=2)
    # Four microbatches, whose blocks are computed again when others have gone through since.
    job = door_1(folder, "similar", *SAME, *PP_2, checkpointing="full")
    runs.add(PIPELINE, job, ranks=2)
    return runs


@pytest.mark.parametrize(
    "split",
    [
        EXPERT_PARALLEL,
        pytest.param(COMPILED, marks=pytest.mark.full),  # test_compiled_layers.py compiles too
        TENSOR_PARALLEL,
        PIPELINE,
    ],
)
def test_gradients_are_those_of_one_rank(runs, split):
    (plain,), of_ranks = runs["plain"], runs[split]
    gradients = {}
    for of_rank in of_ranks:  # in a pipeline each has those of its stage
        gradients |= of_rank["gradients"]
    differences = compare_gradients(gradients, plain["gradients"])
    assert GATE in differences
    assert max(differences.values()) <= TOKENS * 2.0**-24
    losses = of_ranks[-1]["losses"]
    assert losses == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


def test_a_checkpoint_has_the_hosts_names_however_it_was_split(runs, folder):
    record, _ = runs[TENSOR_PARALLEL]
    (folder / "plain.toml").write_text(FLAVOR.partition("[router")[0])
    model = host().build_on_meta(load_flavor("plain", near=folder)).to_empty(device="cpu")
    step = folder / "saved" / "checkpoint" / "step-3"
    dcp.load(state := dict(model.named_parameters()), checkpoint_id=str(step), no_dist=True)
    assert {name: digest(each.detach()) for name, each in state.items()} == record["parameters"]
