"""Other FFNs in real runs of the trainer: sharded, split, compiled, recomputed, resumed.

All of it at once, in as few runs as show it: every run trains on the same sequences, from the same
initial values, so that each has the losses and gradients of the plain one.
"""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from dialect import ON_0_2, SINCE_2026_08
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

FLAVOR = """
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
"""

TOKENS = 4 * 128
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("ffns"))
    (folder / "other.toml").write_text(FLAVOR)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    runs.add("plain", door_1(folder, "other", *SAME_SEQUENCES))
    expert_parallel = [*SAME_SEQUENCES, *EP_2, *AOT]
    job = door_1(folder, "other", *expert_parallel, checkpointing="selective")
    runs.add("expert parallel, fully sharded, compiled, selective", job, ranks=2)
    tensor_parallel = [
        *SAME_SEQUENCES,
        *TYPED_TP_2,
        "--checkpoint.enable",
        "--dump-folder",
        str(folder / "saved"),
    ]
    job = door_1(folder, "other", *tensor_parallel, checkpointing="full")
    runs.add("tensor parallel, types checked, full", job, ranks=2)
    return runs


SPLIT = [
    "expert parallel, fully sharded, compiled, selective",
    "tensor parallel, types checked, full",
]


# test_latent_runs.py compiles experts with all of this, and in a latent, in the short check.
over_splits = pytest.mark.parametrize(
    "split", [pytest.param(SPLIT[0], marks=pytest.mark.full), SPLIT[1]]
)


@over_splits
def test_gradients_are_those_of_one_rank(runs, split):
    (plain,), (of_rank, _) = runs["plain"], runs[split]
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    assert any(name.endswith("b2_ED") for name in differences)
    assert max(differences.values()) <= TOKENS * 2.0**-24


@over_splits
def test_what_steps_make_of_biases_is_that_of_one_rank(runs, split):
    """A bias begins as zero: only later losses tell whether it is added once."""
    (plain,), (of_rank, _) = runs["plain"], runs[split]
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


def test_a_checkpoint_has_the_whole_model_however_it_was_split(runs, folder):
    record, _ = runs[SPLIT[1]]
    model = host().build_on_meta(load_flavor("other", near=folder)).to_empty(device="cpu")
    step = folder / "saved" / "checkpoint" / "step-3"
    dcp.load(state := dict(model.named_parameters()), checkpoint_id=str(step), no_dist=True)
    assert {name: digest(each.detach()) for name, each in state.items()} == record["parameters"]
