"""Balance losses and telemetry in the real trainer: the same step, however it is computed.

All runs start from one seed checkpoint, whose biases send every token to three experts of the
eight, so that no rounding can send one elsewhere. They compute in float32 but for the experts, and
the balance losses' coefficients are so large that the gate's gradient is theirs. A step has four
sequences that end in padding of different lengths.
"""

from pathlib import Path

import pytest
from dialect import ON_0_2, SINCE_2026_08
from trainer_runs import EP_2, Runs, at_once, door_1, job_folder, telemetry, train

pytestmark = [
    pytest.mark.train,
    pytest.mark.ranks,
    pytest.mark.skipif(
        ON_0_2 or SINCE_2026_08, reason="the sequences are handed to the trainer of torchtitan 0.3"
    ),
]

SEQUENCES = 4
FLAVOR = """
inherits = "tiny"
n_layers = 2

[router]
pad_token_id = 0

[balance]
aux_loss = 2000.0
mse_loss = 3000.0
z_loss = 10.0
scope = "{scope}"
aux_loss_choice = "routed"

[telemetry]
images = false
"""
CAPACITY = """
inherits = "tiny"
n_layers = 2
[balance]
capacity_factor = 1.0
drop = "probability"
[telemetry]
images = false
"""
DISPATCHED = """
inherits = "tiny"
n_layers = 2
compute_backend = "{backend}"
[router]
pad_token_id = 0
dispatch_padding = true
[telemetry]
images = false
"""
FLAGS = (
    "--same-sequences",
    *("--training.steps", "2"),
    *("--training.global-batch-size", str(SEQUENCES)),
    *("--training.max-norm", "1e12"),
    *("--checkpoint.enable", "--checkpoint.load-only", "--checkpoint.initial-load-path"),
)
SEED = ("--checkpoint.enable", "--checkpoint.create-seed-checkpoint", "--skewed-routing")
TP_2 = ["--parallelism.tensor-parallel-degree", "2"]

COMPILED = ["--compile.enable", "--compile.backend", "aot_eager"]

ONE_RANK = {
    "one big batch": at_once(4),
    "four microbatches": at_once(1),
    "two microbatches": at_once(2),
    "full checkpointing": at_once(2),
    "selective checkpointing": at_once(2),
    "compiled": [*at_once(2), *COMPILED],
    "compiled by inductor": [*at_once(2), "--compile.enable"],
}
TWO_RANKS = {
    "two ranks": at_once(2),
    "two ranks, two microbatches": at_once(1),
    "expert parallel": [*at_once(1), *EP_2],
    "tensor parallel": [*at_once(4), *TP_2],
    "tensor parallel, DTensor": [*at_once(4), *TP_2, *EP_2[2:]],
    "tensor and expert parallel": [*at_once(4), *TP_2, *EP_2],
    "all DTensor": [*at_once(2), "--parallelism.spmd-backend", "full_dtensor"],
}
CHECKPOINTING = {
    "full checkpointing": "full",
    "compiled, full checkpointing": "full",
    "selective checkpointing": "selective",
    "labels, full checkpointing": "full",
    "dispatched_for_loop, full checkpointing": "full",
}

# A group of "sequence" is a sequence however they are cut. What these show, others of the short
# check do too: what is recomputed is cut into two microbatches; two ranks with parallel experts
# compute two microbatches each; and beside those, tensor parallelism has DTensors.
IN_FULL = (
    "two microbatches",
    "two ranks, two microbatches",
    "tensor parallel, DTensor",
    "compiled by inductor",
)
EVERY_CUT = [
    pytest.param(name, marks=pytest.mark.full if name in IN_FULL else ())
    for name in (*ONE_RANK, *TWO_RANKS, "labels, full checkpointing")
    if name != "one big batch"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("routing"))
    for scope in ("sequence", "batch", "global"):
        (folder / f"{scope}.toml").write_text(FLAVOR.format(scope=scope))
    unmasked = FLAVOR.format(scope="sequence").replace("pad_token_id = 0", "")
    (folder / "unmasked.toml").write_text(unmasked)
    (folder / "capacity.toml").write_text(CAPACITY)
    for backend in ("for_loop", "batched_mm_padded"):
        (folder / f"dispatched_{backend}.toml").write_text(DISPATCHED.format(backend=backend))
    labels = FLAVOR.format(scope="sequence").replace("pad_token_id = 0", 'padding = "labels"')
    (folder / "labels.toml").write_text(labels)
    return folder


OTHERS = {
    "global, one big batch": (1, at_once(4)),
    "batch, four microbatches": (1, at_once(1)),
    "unmasked, one big batch": (1, at_once(4)),
    "labels, full checkpointing": (1, at_once(2)),
    "global, two ranks": (2, at_once(2)),
    "batch, two ranks": (2, at_once(1)),
    "capacity, two ranks": (2, at_once(2)),
    "capacity, expert parallel": (2, [*at_once(2), *EP_2]),
    "capacity, full checkpointing": (1, at_once(2)),
    "capacity, compiled, full checkpointing": (1, [*at_once(2), *COMPILED]),
    "dispatched_for_loop, full checkpointing": (1, at_once(2)),
    "dispatched_batched_mm_padded, two ranks": (2, at_once(2)),
    "unmasked, pipeline": (2, [*at_once(4), "--parallelism.pipeline-parallel-degree", "2"]),
}
"""Of other flavors those that are compared, with their ranks."""


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    """Scenario -> one record per rank."""
    train({"seed": door_1(folder, "sequence_sdpa", *SEED)}, folder, ranks=1)
    start = [*FLAGS, str(folder / "seed" / "checkpoint" / "step-0")]
    scenarios = {name: ("sequence", 1, flags) for name, flags in ONE_RANK.items()}
    scenarios |= {name: ("sequence", 2, flags) for name, flags in TWO_RANKS.items()}
    for name, (ranks, flags) in OTHERS.items():
        scenarios[name] = name.partition(",")[0], ranks, flags
    runs = Runs(folder)
    for name, (flavor, ranks, flags) in scenarios.items():
        mode = CHECKPOINTING.get(name.rpartition("capacity, ")[2], "none")
        job = door_1(folder, f"{flavor}_sdpa", *start, *flags, checkpointing=mode)
        runs.add(name, job, ranks=ranks)
    return runs


def gate_gradient(ranks):
    """Of the one MoE layer; in a pipeline the second rank has it."""
    name = "layers.1.moe.router.gate.weight"
    return next(each["gradients"][name] for each in ranks if name in each["gradients"]).double()


def difference(ours, other) -> float:
    return ((ours - other).norm() / other.norm()).item()


# float32 sums over 4 * 128 tokens in another order, after two layers of them; the rest is the
# trainer's own loss, whose experts round to bfloat16 (2**-9) at some 1e-4 of the gate's gradient.
ALLOWED = 1e-5


@pytest.mark.parametrize("name", EVERY_CUT)
def test_the_gradient_is_that_of_one_big_batch(runs, name):
    big, cut = gate_gradient(runs["one big batch"]), gate_gradient(runs[name])
    assert difference(cut, big) < ALLOWED


def test_global_groups_of_two_ranks_are_one_group(runs):
    big = gate_gradient(runs["global, one big batch"])
    assert difference(gate_gradient(runs["global, two ranks"]), big) < ALLOWED


def test_the_same_microbatches_on_two_ranks_have_the_same_mean(runs):
    one = gate_gradient(runs["batch, four microbatches"])
    assert difference(gate_gradient(runs["batch, two ranks"]), one) < ALLOWED


def test_in_a_pipeline_the_gradient_is_that_of_one_big_batch_too(runs):
    """Where microbatches are cut further, and padding is refused."""
    big = gate_gradient(runs["unmasked, one big batch"])
    assert difference(gate_gradient(runs["unmasked, pipeline"]), big) < ALLOWED


def test_the_scopes_are_different_losses(runs):
    """Or the tests above could not tell them apart."""
    sequence, everything, batch = map(
        gate_gradient,
        (runs["one big batch"], runs["global, one big batch"], runs["batch, four microbatches"]),
    )
    assert difference(everything, sequence) > 100 * ALLOWED
    assert difference(batch, everything) > 100 * ALLOWED


# test_routing_capacity.py compiles what drops in the short check, recomputed and not.
@pytest.mark.parametrize("compiled", ["", pytest.param("compiled, ", marks=pytest.mark.full)])
def test_a_capacity_drops_the_same_whoever_holds_the_experts(runs, folder, compiled):
    """Every token wants the same three of eight experts, each of which takes an eighth of all.

    Under expert parallelism one rank has all three. Recomputation drops the same once more.
    """
    of_ranks = ("capacity, two ranks", "capacity, expert parallel")
    names = (*of_ranks, f"capacity, {compiled}full checkpointing")
    assert all(runs[name] for name in names)
    two_ranks, expert_parallel, recomputed = (telemetry(folder, name)[0] for name in names)
    for line in (two_ranks, expert_parallel, recomputed):
        assert line["layers"][0]["drop_rate"] == 1 - 3 / 8
    assert expert_parallel["loss"] == pytest.approx(two_ranks["loss"], rel=ALLOWED)
    assert difference(*(gate_gradient(runs[name]) for name in names[:2])) < ALLOWED


def test_a_pipelines_stages_report_together(runs, folder):
    names = [f"unmasked, {name}" for name in ("pipeline", "one big batch")]
    assert all(runs[name] for name in names)
    (line, _), (big, _) = (telemetry(folder, name) for name in names)
    assert line["layers"][0]["counts_E"] == big["layers"][0]["counts_E"]
    assert line["loss"] == pytest.approx(big["loss"], rel=1e-3)


def test_the_load_of_ranks_is_that_of_their_experts(runs, folder):
    """Of the eight experts the first rank has four; all tokens want the same three."""
    names = ("expert parallel", "two ranks")
    assert all(runs[name] for name in names)
    of_ranks, of_none = (telemetry(folder, name)[0]["layers"][0] for name in names)
    halves = sum(of_ranks["counts_E"][:4]), sum(of_ranks["counts_E"][4:])
    assert of_ranks["rank_max_over_mean"] == 2 * max(halves) / sum(halves)
    assert of_none["rank_max_over_mean"] is None
    # Four digits each, of probabilities whose sum is 1.
    assert sum(of_ranks["probabilities_E"]) == pytest.approx(1, abs=5e-4)
    assert of_ranks["probabilities_E"] == pytest.approx(of_none["probabilities_E"], rel=1e-3)


PADDING = sum(max(0, sequence * 7 - 1) for sequence in range(SEQUENCES))
"""Padding tokens of a step."""


@pytest.mark.parametrize("name", [name for name in OTHERS if "dispatched" in name])
def test_padding_that_is_dispatched_is_counted_where_it_costs(runs, folder, name):
    """By every backend: all tokens want the same three experts, so that no row is nobody's."""
    assert runs[name]
    for line in telemetry(folder, name):
        (layer,) = line["layers"]
        assert layer["tokens"] == SEQUENCES * 128 - PADDING
        assert sum(layer["counts_E"]) == 3 * layer["tokens"]
        assert layer["padding_waste"] == pytest.approx(PADDING / (SEQUENCES * 128), rel=1e-12)
        assert layer["drop_rate"] == 0


@pytest.mark.parametrize("name", EVERY_CUT)
def test_telemetry_counts_every_token_once(runs, folder, name):
    """Whatever is recomputed, accumulated or shared out, and without the padding."""
    assert runs[name]
    assert runs["one big batch"]
    ours, big = telemetry(folder, name), telemetry(folder, "one big batch")
    assert [line["step"] for line in ours] == [1, 2]
    for line, reference in zip(ours, big, strict=True):
        (layer,), (expected,) = line["layers"], reference["layers"]
        assert layer["tokens"] == SEQUENCES * 128 - PADDING
        assert layer["padding_waste"] is None  # of padding that no expert has seen
        assert layer["counts_E"] == expected["counts_E"]
        assert layer["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert layer["top1_probability"] == pytest.approx(expected["top1_probability"], rel=1e-4)
