"""Experts in a latent in real runs of the trainer: sharded, split, compiled, recomputed, resumed.

They have all that experts can have: another FFN, biases, gated shared experts.

All of it at once, in as few runs as show it: every run trains on the same sequences, from the same
initial values, so that each has the losses and gradients of the plain one.
"""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from dialect import LENGTH, ON_0_2, SINCE_2026_08
from run_trainer import digest
from trainer_runs import (
    AOT,
    EP_2,
    SAME_SEQUENCES,
    TYPED_TP_2,
    Runs,
    compare_gradients,
    door_1,
    job_folder,
)

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import host

Z, K = 24, 3
FLAVOR = f"""
inherits = "tiny"
n_layers = 2
n_heads = 4
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
expert_activation = "relu2"
expert_bias = true
ffn_activation = "geglu"
shared_hidden_dim = 96
shared_gate = true
moe_latent_dim = {Z}
"""

TOKENS = 4 * LENGTH
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]

ONE_NODE = "one node, expert parallel, fully sharded, compiled, selective"
TENSOR_PARALLEL = "tensor parallel, types checked, full"
BEFORE = "scores on inputs, composed, expert parallel"
EQUALS = {ONE_NODE: "plain", TENSOR_PARALLEL: "plain", BEFORE: "plain, before"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("latent"))
    (folder / "latent.toml").write_text(FLAVOR)
    # Which makes the layer composed.
    (folder / "before.toml").write_text('inherits = "latent"\nrouter_scores = "before"\n')
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    runs.add("plain", door_1(folder, "latent", *SAME_SEQUENCES))
    runs.add("plain, before", door_1(folder, "before", *SAME_SEQUENCES))
    job = door_1(folder, "latent", *SAME_SEQUENCES, *EP_2, *AOT, checkpointing="selective")
    runs.add(ONE_NODE, job, ranks=2)
    saved = ["--checkpoint.enable", "--dump-folder", str(folder / "saved")]
    job = door_1(folder, "latent", *SAME_SEQUENCES, *TYPED_TP_2, *saved, checkpointing="full")
    runs.add(TENSOR_PARALLEL, job, ranks=2)
    job = door_1(folder, "before", *SAME_SEQUENCES, *EP_2, "--count-sent")
    runs.add(BEFORE, job, ranks=2)
    return runs


@pytest.mark.parametrize("split", EQUALS)
def test_gradients_are_those_of_one_rank(runs, split):
    (plain,), (of_rank, _) = runs[EQUALS[split]], runs[split]
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    for own in ("descend.weight", "b2_ED", "shared_experts.gate.weight"):
        assert any(name.endswith(own) for name in differences)
    assert max(differences.values()) <= TOKENS * 2.0**-24
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


def test_scores_on_inputs_are_another_model(runs):
    """Whose small scores count twice in a square."""
    (after,), (before,) = runs["plain"], runs["plain, before"]
    assert after["first_parameters"] == before["first_parameters"]
    differences = compare_gradients(before["gradients"], after["gradients"])
    assert differences["layers.1.moe.routed_experts.descend.weight"] > 0.5


def test_what_ranks_send_has_the_latents_width(runs):
    """A row for each choice, there and back, in each of three steps, of the one layer."""
    tokens = TOKENS // 2  # of a rank
    for of_rank in runs[BEFORE]:
        assert {width for _, width in of_rank["sent"]} == {Z}
        there = [rows for rows, _ in of_rank["sent"]][::2]
        assert sum(there) == 3 * tokens * K
    rows = sum(rows for of_rank in runs[BEFORE] for rows, _ in of_rank["sent"])
    assert rows == 2 * 2 * 3 * tokens * K


def test_a_checkpoint_has_the_whole_model_however_it_was_split(runs, folder):
    record, _ = runs[TENSOR_PARALLEL]
    model = host().build_on_meta(load_flavor("latent", near=folder)).to_empty(device="cpu")
    step = folder / "saved" / "checkpoint" / "step-3"
    dcp.load(state := dict(model.named_parameters()), checkpoint_id=str(step), no_dist=True)
    assert {name: digest(each.detach()) for name, each in state.items()} == record["parameters"]
