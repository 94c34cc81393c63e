"""The backends under the host's parallelisms: real processes over gloo, real trainer.

What a parallelism changes it changes for the host's own experts too: sums in another order, in
bfloat16. So the yardstick of every comparison is the host's own deviation in the same comparison,
measured here, and a backend may deviate by twice that. Routing is the same everywhere, because a
token that flips to another expert is no rounding error: forced to be even
(``debug.moe_force_load_balance``) or, by the experts' bias, to three experts of the eight. All runs
load a seed checkpoint, because the host draws other initial values under other parallelisms.
"""

import pytest
from dialect import ON_0_2, SINCE_2026_08, SINCE_2026_09, batch
from trainer_runs import (
    BACKENDS,
    COMPUTED_BY,
    Record,
    Runs,
    assert_within_twice,
    compare_gradients,
    composed,
    door_1,
    job_folder,
    train,
)

HOST = "grouped_mm"
OF_COMPOSED = ", composed"
SEED = ("--checkpoint.enable", "--checkpoint.create-seed-checkpoint")
EVEN = ("--debug.moe-force-load-balance",)
SKEWED = ("--skewed-routing",)
START = (
    *("--training.steps", "2"),
    *("--checkpoint.enable", "--checkpoint.load-only", "--checkpoint.initial-load-path"),
)

TWO_RANKS = {
    "tensor parallel": ["--parallelism.tensor-parallel-degree", "2"],
    "fully sharded": [],
    "pipeline parallel": ["--parallelism.pipeline-parallel-degree", "2"],
}
TWO_RANKS_SKEWED = {"fully sharded, skewed": []}
FOUR_RANKS = {
    "hybrid sharded": [
        *("--parallelism.data-parallel-replicate-degree", "2"),
        *("--parallelism.data-parallel-shard-degree", "2"),
    ],
}

# A parallelism, and one that computes the same step on the same data.
EQUALS = {"tensor parallel": "single", "pipeline parallel": "single"}
IN_FLOAT32 = set()
"""Parallelisms under which the host leaves mixed precision, but the experts do not."""

if ON_0_2:
    IN_FLOAT32 |= {"tensor parallel", "pipeline parallel"}  # without FSDP it has no autocast
else:  # 0.2 sorts tokens for it with a Triton kernel, which does not run on a CPU
    EP_2 = [
        *("--parallelism.expert-parallel-degree", "2"),
        *("--parallelism.spmd-backend", "partial_dtensor"),
    ]
    EP_4 = ["--parallelism.expert-parallel-degree", "4", *EP_2[2:]]
    AOT = ["--compile.enable", "--compile.backend", "aot_eager"]
    TWO_RANKS |= {"expert parallel": EP_2, "compiled, expert parallel": [*EP_2, *AOT]}
    TWO_RANKS |= {"expert parallel, composed": EP_2, "fully sharded, composed": []}
    TWO_RANKS_SKEWED |= {"expert parallel, skewed": EP_2}
    TWO_RANKS_SKEWED |= {
        "expert parallel, skewed, composed": EP_2,
        "fully sharded, skewed, composed": [],
    }
    FOUR_RANKS |= {"four expert parallel": EP_4}
    EQUALS |= {
        "expert parallel": "fully sharded",
        "compiled, expert parallel": "expert parallel",
        "expert parallel, skewed": "fully sharded, skewed",
        "expert parallel, composed": "fully sharded, composed",
        "expert parallel, skewed, composed": "fully sharded, skewed, composed",
        "four expert parallel": "hybrid sharded",
    }

if (
    SINCE_2026_08
):  # the degree as a flag leaves the job's batch whole; each of its sequences is one here
    TWO_RANKS["pipeline parallel"] += ["--parallelism.num-pp-microbatches", "2", *batch(size=1)]

ALL = ["single", *TWO_RANKS, *TWO_RANKS_SKEWED, *FOUR_RANKS]
# What a kernel sees differs under these alone: other weights' memory, other numbers of rows.
WITH_OPTIONS_TOO = {name for name in ALL if name.startswith(("fully sharded", "expert parallel"))}
SAME_PRECISION = [parallelism for parallelism in ALL if parallelism not in IN_FLOAT32]
# Since August 2026 positions count anew in every microbatch: RoPE turns by other angles, and rounds
# otherwise.
SAME_ROUNDING = set(SAME_PRECISION) - ({"pipeline parallel"} if SINCE_2026_08 else set())

SHORT = {
    "single": BACKENDS,
    "tensor parallel": ["for_loop"],
    "pipeline parallel": ["batched_mm_padded"],
    "fully sharded": ["batched_mm_padded"],
    "expert parallel": ["batched_mm_padded"],
    "compiled, expert parallel": [],
    "fully sharded, composed": [],
    "expert parallel, composed": [],
    "fully sharded, skewed": COMPUTED_BY.keys() - {"batched_mm_padded"},
    "expert parallel, skewed": COMPUTED_BY.keys() - {"batched_mm_padded"},
    "fully sharded, skewed, composed": ["for_loop"],
    "expert parallel, skewed, composed": ["for_loop"],
    "hybrid sharded": ["for_loop"],
    "four expert parallel": [],
}
"""Each parallelism with some of the backends: the rest is the full check's."""

COMPOSED = {p for p in ALL if p.endswith(OF_COMPOSED)}
if ON_0_2 or SINCE_2026_09:
    COMPOSED = set(ALL)
TYPES_CHECKED = ("--debug.spmd-typechecking", "--parallelism.spmd-backend", "spmd_types")
NOISE = "--rounding-noise"
DRAWS = 2
NOISY = {
    "tensor parallel": "for_loop",
    "fully sharded": "batched_mm_padded",
    "expert parallel": "batched_mm_padded",
}
"""Parallelisms under which the host also trains with one more rounding, and a backend of each."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]


class Parallel(Runs):
    """Runs by parallelism and backend. The host's own layers are composed, asked for or not."""

    def __getitem__(self, key: tuple[str, str] | str) -> list[Record]:
        if key[1] == HOST:
            key = key[0].removesuffix(OF_COMPOSED), HOST
        return super().__getitem__(key)


def backends_of(parallelism: str) -> list[str]:
    """The ends of the flavors' names that are trained under it."""
    return list(COMPUTED_BY if parallelism in WITH_OPTIONS_TOO else BACKENDS)


def over_backends_of(parallelisms):
    """Each of ``parallelisms`` with its backends; one that says so if there are none."""
    pairs = [
        pytest.param(p, backend, marks=() if backend in SHORT[p] else pytest.mark.full)
        for p in parallelisms
        for backend in backends_of(p)
    ]
    return pytest.mark.parametrize(("parallelism", "backend"), pairs or [("none", "none")])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """(parallelism, backend) -> one record per rank."""
    folder = job_folder(tmp_path_factory.mktemp("parallel"))
    seeds = {name: door_1(folder, "tiny_sdpa", *SEED) for name in ("even", "skewed")}
    seeds["skewed"] += SKEWED
    train(seeds, folder, ranks=1)
    even, skewed = ([*START, str(folder / name / "checkpoint" / "step-0")] for name in seeds)
    even += EVEN
    runs = Parallel(folder)
    for ranks, start, parallelisms in (
        (1, even, {"single": []}),
        (2, even, TWO_RANKS),
        (2, skewed, TWO_RANKS_SKEWED),
        (4, even, FOUR_RANKS),
    ):
        for name, flags in parallelisms.items():
            for backend in (HOST, *backends_of(name)):
                is_asked_for = name.endswith(OF_COMPOSED) and backend != HOST
                flavor = composed(folder, backend) if is_asked_for else backend
                job = door_1(folder, f"tiny_sdpa_{flavor}", *start, *flags)
                runs.add((name, backend), job, ranks=ranks)
    for name, ranks, draws in (("single", 1, DRAWS), *((name, 2, 1) for name in NOISY)):
        for noise in (f"{NOISE}={draw}" for draw in range(draws)):
            job = door_1(folder, f"tiny_sdpa_{HOST}", *even, *TWO_RANKS.get(name, []), noise)
            runs.add((name, noise), job, ranks=ranks)
    runs.add(
        "types checked", door_1(folder, "tiny_sdpa_for_loop", *skewed, *TYPES_CHECKED), ranks=2
    )
    return runs


def gradients(ranks) -> dict:
    """The gradients of all ranks: pipeline stages have different parameters."""
    return {name: gradient for record in ranks for name, gradient in record["gradients"].items()}


def losses(ranks) -> list[float]:
    """The last stage knows the loss; the others report a negative number."""
    return max((record["losses"] for record in ranks), key=lambda each: each[0])


@over_backends_of(ALL)
def test_every_rank_computes_with_the_chosen_backend(runs, parallelism, backend):
    for record in runs[parallelism, backend]:
        assert record["backends"]
        assert set(record["backends"]) == {COMPUTED_BY[backend]}


@over_backends_of(EQUALS)
def test_gradients_equal_those_without_the_parallelism(runs, parallelism, backend):
    other = EQUALS[parallelism]
    ours, host = (
        compare_gradients(gradients(runs[parallelism, b]), gradients(runs[other, b]))
        for b in (backend, HOST)
    )
    for parameter, difference in ours.items():
        assert difference <= 2 * host[parameter] + 1e-6, parameter


@over_backends_of(SAME_PRECISION)
def test_the_first_loss_has_the_hosts_bits(runs, parallelism, backend):
    """Within what one more rounding does where the routed layer is one node."""
    ours, host = (losses(runs[parallelism, b])[0] for b in (backend, HOST))
    if parallelism in COMPOSED:
        assert ours == host
    else:
        noisy = [losses(runs["single", f"{NOISE}={draw}"])[0] for draw in range(DRAWS)]
        largest = max(abs(each - losses(runs["single", HOST])[0]) for each in noisy)
        assert abs(ours - host) <= 2 * largest + 2.0**-23 * host  # and of the loss itself


@pytest.mark.skipif(ON_0_2, reason="there every routed layer is composed")
@pytest.mark.parametrize("parallelism", NOISY)
def test_gradients_of_one_node_are_the_hosts_but_for_a_rounding(runs, parallelism):
    ours, noisy, host = (
        gradients(runs[parallelism, b]) for b in (NOISY[parallelism], f"{NOISE}=0", HOST)
    )
    assert_within_twice(ours, noisy, of=host)


@pytest.mark.skipif(not IN_FLOAT32, reason="this host has mixed precision everywhere")
@over_backends_of(sorted(IN_FLOAT32))
def test_rounding_the_experts_alone_costs_less_than_rounding_everything(runs, parallelism, backend):
    ours, host, rounded = (
        losses(runs[key])[0]
        for key in ((parallelism, backend), (parallelism, HOST), ("single", HOST))
    )
    assert abs(ours - host) < abs(rounded - host)


@pytest.mark.skipif(ON_0_2, reason="this host checks no types")
def test_the_hosts_type_checker_lets_it_pass(runs):
    """What is sharded, partial or a rank's own, in every operation that the host sees."""
    assert len(losses(runs["types checked"])) == 2


@over_backends_of(ALL)
def test_a_step_changes_the_loss_as_the_hosts_own_does(runs, parallelism, backend):
    """Not that it falls: since August 2026 the data is shuffled, and the next batch may be harder.

    bfloat16 rounds gradients by 2**-8, and so much of what the step changes may differ.
    """
    (first, ours), (_, host) = (losses(runs[parallelism, b]) for b in (backend, HOST))
    assert abs(ours - host) <= 2.0**-8 * abs(host - first)


ADDENDS = {
    # A pipeline adds the loss up in another order: two microbatches of eight chunks each.
    "pipeline parallel": 2 * 8,
    "expert parallel, composed": 0,
    "expert parallel, skewed, composed": 0,
}
COMPARABLE = sorted(SAME_ROUNDING & ADDENDS.keys() & EQUALS.keys())


@pytest.mark.skipif(not COMPARABLE, reason="this host rounds otherwise under each of them")
@over_backends_of(COMPARABLE)
def test_the_first_loss_does_not_depend_on_the_parallelism(runs, parallelism, backend):
    """The same bits, but for a rounding of 2**-24 per addition in float32."""
    ours, other = (losses(runs[p, backend])[0] for p in (parallelism, EQUALS[parallelism]))
    assert abs(ours - other) <= ADDENDS[parallelism] * 2.0**-24 * other
