"""The bytes of every collective that a plan predicts, against those counted in real runs.

All in float32 over gloo, two and four ranks, the model of tests/data/tiny.
"""

from collections import Counter

import pytest
from dialect import ON_0_2, SINCE_2026_08
from trainer_runs import EP_2, SAME_SEQUENCES, TYPED_TP_2, Runs, door_1, job_folder

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.planning.cuts import Cut
from ezpz_moe.tools.planning.memory import stage_parts
from ezpz_moe.tools.planning.traffic import traffic

pytestmark = [pytest.mark.train, pytest.mark.ranks]

COUNTED = [*SAME_SEQUENCES, "--count-collectives"]
FLAGS = {
    "sharded": [],
    "replicas": [
        *("--parallelism.data-parallel-replicate-degree", "2"),
        *("--training.local-batch-size", "1"),
    ],
    "experts": EP_2,
    "tensor parallel": TYPED_TP_2[:2],
    "pipeline": [
        *("--parallelism.pipeline-parallel-degree", "2"),
        *("--training.local-batch-size", "4"),
    ],
    "experts of shards": [*EP_2, "--training.local-batch-size", "1"],
    # Its first step also runs forward on no numbers, to find shapes, and gathers for that.
    "pipeline of shards": ["--parallelism.pipeline-parallel-degree", "2"],
    "tensor parallel of shards": TYPED_TP_2[:2],
}
CHECKPOINTING = {"experts": "full"}
CUTS = {
    "sharded": Cut(2, 1, 1, 1, 1, 2, 1, "none"),
    "replicas": Cut(1, 2, 1, 1, 1, 1, 2, "none"),
    "experts": Cut(2, 1, 1, 1, 2, 2, 1, "full"),
    "tensor parallel": Cut(1, 1, 2, 1, 1, 2, 2, "none"),
    "pipeline": Cut(1, 1, 1, 2, 1, 1, 4, "none"),
    "experts of shards": Cut(4, 1, 1, 1, 2, 1, 1, "none"),
    "pipeline of shards": Cut(2, 1, 1, 2, 1, 1, 2, "none"),
    "tensor parallel of shards": Cut(2, 1, 2, 1, 1, 2, 1, "none"),
}
KINDS = {
    "_allgather_base": "all-gather",
    "allgather_base": "all-gather",
    "reduce_scatter_base": "reduce-scatter",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "all_to_all_single": "all-to-all",
    "send": "send",
}
"""The operators of what a plan has; the trainer's records gather parameters with another one."""

NOT_PLANNED = {(), (1,), (2, 8), (1, 8), (2, 4)}
"""Shapes of what a plan leaves out: figures of the loss and the norm, counts of the tokens of a
stage's two layers or of its one, and of one layer's for two ranks."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = job_folder(tmp_path_factory.mktemp("planning"))
    runs = Runs(folder)
    for name, flags in FLAGS.items():
        mode = CHECKPOINTING.get(name, "none")
        steps = ["--training.steps", "2" if name == "pipeline of shards" else "1"]
        arguments = door_1(folder, "tiny_sdpa", *COUNTED, *steps, *flags, checkpointing=mode)
        runs.add(name, arguments, ranks=CUTS[name].ranks)
    return runs


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    folder = job_folder(tmp_path_factory.mktemp("sheet"))
    return host().planning().model_sheet(str(folder / "job.toml"), [], is_cpu=True)


@pytest.mark.parametrize("name", CUTS)
def test_bytes_of_every_collective_are_those_of_a_real_run(name, runs, sheet):
    """Of all ranks: what one has more of rows, as routing has it, another has less."""
    cut, planned, found = CUTS[name], Counter(), Counter()
    for rank, record in enumerate(runs[name]):
        found += counted(record)
        stage = rank * cut.pp // cut.ranks
        for each in traffic(sheet, cut, stage_parts(sheet, cut.pp)[stage], stage):
            planned[each.kind] += each.bytes_of_step
    assert found == planned


def counted(record) -> Counter:
    found = Counter()
    for operator, shape, size in record["collectives"]:
        # A stage tells its neighbours once what they will get, in vectors of bytes.
        is_metadata = operator == "send" and len(shape) == 1
        if operator in KINDS and shape not in NOT_PLANNED and not is_metadata:
            found[KINDS[operator]] += size
    return found


def test_the_runs_were_of_several_kinds(runs):
    """So that nothing is compared with nothing."""
    kinds = {name: set(counted(runs[name][0])) for name in CUTS}
    assert kinds == {
        "sharded": {"all-gather", "reduce-scatter"},
        "replicas": {"all-reduce"},
        "experts": {"all-gather", "reduce-scatter", "all-to-all"},
        "tensor parallel": {"all-gather", "reduce-scatter", "all-reduce"},
        "pipeline": {"send"},
        "experts of shards": {"all-gather", "reduce-scatter", "all-to-all"},
        "pipeline of shards": {"all-gather", "reduce-scatter", "send"},
        "tensor parallel of shards": {"all-gather", "reduce-scatter", "all-reduce"},
    }
