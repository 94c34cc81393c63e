"""Routing by ReLU in real runs of the trainer: sharded, split, compiled, recomputed, resumed.

All of it at once, in as few runs as show it: every run trains on the same sequences, from the same
initial values, so that each has the losses and gradients of the plain one.
"""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from dialect import LENGTH, ON_0_2, SINCE_2026_08
from router_cases import RELU
from run_trainer import digest
from trainer_runs import AOT, EP_2, Runs, compare_gradients, door_1, job_folder, telemetry

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host

E, SEQUENCES, STEPS = 8, 4, 3
FLAVOR = f"""
inherits = "tiny"
n_layers = 2
n_heads = 4
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
{RELU}
scope = "{{scope}}"
chunk = 16
[telemetry]
images = false
"""
SAME = ["--same-sequences", "--training.global-batch-size", str(SEQUENCES)]
TP_2 = ["--parallelism.tensor-parallel-degree", "2"]

TOKENS = SEQUENCES * LENGTH
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]

EXPERT_PARALLEL = "expert parallel, fully sharded, selective"
COMPILED = f"compiled, {EXPERT_PARALLEL}"
TENSOR_PARALLEL = "tensor parallel, full"
GLOBAL = "global, fully sharded"
EQUALS = {
    EXPERT_PARALLEL: "plain",
    COMPILED: "plain",
    TENSOR_PARALLEL: "plain",
    GLOBAL: "plain, global",
}
SCALE = "layers.1.moe.router.gate.scale_E"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("relu"))
    for scope in ("sequence", "global"):
        (folder / f"{scope}.toml").write_text(FLAVOR.format(scope=scope))
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    big = ["--training.local-batch-size", str(SEQUENCES)]
    runs.add("plain", door_1(folder, "sequence", *SAME))
    runs.add("plain, global", door_1(folder, "global", *SAME, *big))
    for name, more in ((EXPERT_PARALLEL, []), (COMPILED, AOT)):
        job = door_1(folder, "sequence", *SAME, *EP_2, *more, checkpointing="selective")
        runs.add(name, job, ranks=2)
    saved = ["--checkpoint.enable", "--dump-folder", str(folder / "saved")]
    job = door_1(folder, "sequence", *SAME, *TP_2, *saved, checkpointing="full")
    runs.add(TENSOR_PARALLEL, job, ranks=2)
    half = ["--training.local-batch-size", str(SEQUENCES // 2)]
    runs.add(GLOBAL, door_1(folder, "global", *SAME, *half), ranks=2)
    return runs


def over(splits):
    """``test_compiled_layers.py`` compiles in the short check."""
    return pytest.mark.parametrize(
        "split",
        [pytest.param(each, marks=pytest.mark.full if each == COMPILED else ()) for each in splits],
    )


@over(EQUALS)
def test_gradients_are_those_of_one_rank(runs, split):
    (plain,), (of_rank, _) = runs[EQUALS[split]], runs[split]
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    assert SCALE in differences
    assert max(differences.values()) <= TOKENS * 2.0**-24
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


@over([EXPERT_PARALLEL, COMPILED, GLOBAL])
def test_telemetry_reports_what_one_rank_does(runs, folder, split):
    """Each choice once, whatever is recomputed, and both losses without and with coefficients."""
    assert runs[split]
    assert runs[EQUALS[split]]
    for line, plain in zip(telemetry(folder, split), telemetry(folder, EQUALS[split]), strict=True):
        (layer,), (expected,) = line["layers"], plain["layers"]
        choices = sum(layer["counts_E"]) + sum(layer["zero_counts_Z"])
        assert choices == line["steps"] * TOKENS * E
        assert layer["counts_E"] == expected["counts_E"]
        assert layer["figures"]["zero_fraction"] == layer["zero_counts_Z"][0] / choices > 0
        assert layer["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for loss, coefficient in (("locality_loss", 0.02), ("chunk_loss", 0.5)):
            assert layer["losses"][loss] > 0
            scaled = coefficient * layer["losses"][loss]
            assert layer["scaled_losses"][loss] == pytest.approx(scaled, rel=1e-6)


def test_a_checkpoint_has_the_whole_model_however_it_was_split(runs, folder):
    record, _ = runs[TENSOR_PARALLEL]
    model = host().build_on_meta(load_flavor("sequence", near=folder)).to_empty(device="cpu")
    step = folder / "saved" / "checkpoint" / f"step-{STEPS}"
    dcp.load(state := dict(model.named_parameters()), checkpoint_id=str(step), no_dist=True)
    assert SCALE in state
    assert (state[SCALE] != 1).all()  # it has learnt
    assert {name: digest(each.detach()) for name, each in state.items()} == record["parameters"]
