"""The backends under the host's parallelisms: real processes over gloo, real trainer.

What a parallelism changes it changes for the host's own experts too: sums in another order, in
bfloat16. So the yardstick of every comparison is the host's own deviation in the same comparison,
measured here, and a backend may deviate by twice that. Routing is forced to be even and the same
everywhere (``debug.moe_force_load_balance``), because a token that flips to another expert is no
rounding error, and all runs load one seed checkpoint, because the host draws other initial values
under other parallelisms.
"""

import pytest
from trainer_runs import compare_gradients, door_1, job_folder, train

BACKENDS = ("for_loop", "batched_mm_padded")
HOST = "grouped_mm"
SEED = ("--checkpoint.enable", "--checkpoint.create-seed-checkpoint")
START = (
    *("--debug.moe-force-load-balance", "--training.steps", "2"),
    *("--checkpoint.enable", "--checkpoint.load-only", "--checkpoint.initial-load-path"),
)

TWO_RANKS = {
    "tensor parallel": ["--parallelism.tensor-parallel-degree", "2"],
    "expert parallel": [
        *("--parallelism.expert-parallel-degree", "2"),
        *("--parallelism.spmd-backend", "partial_dtensor"),
    ],
    "fully sharded": [],
    "pipeline parallel": ["--parallelism.pipeline-parallel-degree", "2"],
}
FOUR_RANKS = {
    "hybrid sharded": [
        *("--parallelism.data-parallel-replicate-degree", "2"),
        *("--parallelism.data-parallel-shard-degree", "2"),
    ],
}
# A parallelism, and one that computes the same step on the same data.
EQUALS = {
    "tensor parallel": "single",
    "pipeline parallel": "single",
    "expert parallel": "fully sharded",
}

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(parallelism, backend) -> one record per rank."""
    folder = job_folder(tmp_path_factory.mktemp("seed"))
    train({"seed": door_1(folder, "tiny_sdpa", *SEED)}, folder, ranks=1)
    start = (*START, str(folder / "seed" / "checkpoint" / "step-0"))
    records = {}
    for ranks, parallelisms in ((1, {"single": []}), (2, TWO_RANKS), (4, FOUR_RANKS)):
        folder = job_folder(tmp_path_factory.mktemp(f"ranks{ranks}"))
        names = {f"{p} {b}": (p, b) for p in parallelisms for b in (HOST, *BACKENDS)}
        scenarios = {
            name: door_1(folder, f"tiny_sdpa_{b}", *start, *parallelisms[p])
            for name, (p, b) in names.items()
        }
        results = train(scenarios, folder, ranks=ranks)
        records |= {names[name]: result for name, result in results.items()}
    return records


def gradients(ranks) -> dict:
    """The gradients of all ranks: pipeline stages have different parameters."""
    return {name: gradient for record in ranks for name, gradient in record["gradients"].items()}


def losses(ranks) -> list[float]:
    """The last stage knows the loss; the others report a negative number."""
    return max((record["losses"] for record in ranks), key=lambda each: each[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parallelism", [*TWO_RANKS, *FOUR_RANKS])
def test_every_rank_computes_with_the_chosen_backend(runs, parallelism, backend):
    for record in runs[parallelism, backend]:
        assert record["backends"]
        assert set(record["backends"]) == {backend}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parallelism", EQUALS)
def test_gradients_equal_those_without_the_parallelism(runs, parallelism, backend):
    other = EQUALS[parallelism]
    ours, host = (
        compare_gradients(gradients(runs[parallelism, b]), gradients(runs[other, b]))
        for b in (backend, HOST)
    )
    for parameter, difference in ours.items():
        assert difference <= 2 * host[parameter] + 1e-6, parameter


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("parallelism", ["single", *TWO_RANKS, *FOUR_RANKS])
def test_the_first_loss_has_the_hosts_bits_and_the_second_is_lower(runs, parallelism, backend):
    ours, host = losses(runs[parallelism, backend]), losses(runs[parallelism, HOST])
    assert ours[0] == host[0]
    assert ours[1] < ours[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("parallelism", "addends"), [("expert parallel", 0), ("pipeline parallel", 2 * 8)]
)
def test_the_first_loss_does_not_depend_on_the_parallelism(runs, parallelism, addends, backend):
    """The same bits, but that a pipeline adds the loss up in another order: two microbatches of
    eight chunks each, in float32, with a rounding of 2**-24 per addition."""
    ours, other = (losses(runs[p, backend])[0] for p in (parallelism, EQUALS[parallelism]))
    assert abs(ours - other) <= addends * 2.0**-24 * other
