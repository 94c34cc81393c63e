"""Shared experts on a stream of their own in runs of the trainer: sharded, recomputed, resumed.

A CPU has no streams. In one run it has those of ``torch.cpu``, stand-ins: layers then start their
shared experts first, under expert parallelism and FSDP. Every run trains on the same sequences,
from the same initial values.
"""

from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from dialect import LENGTH, ON_0_2, SINCE_2026_08
from run_trainer import digest
from trainer_runs import EP_2, LOG, Runs, assert_same_bits, compare_gradients, door_1, job_folder

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
shared_gate = true
ffn_activation = "geglu"
"""
SAME = ["--same-sequences", "--training.global-batch-size", "4"]

TOKENS = 4 * LENGTH
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("overlap"))
    (folder / "plain.toml").write_text(FLAVOR)
    (folder / "overlap.toml").write_text('inherits = "plain"\noverlap_shared_experts = true\n')
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Runs:
    runs = Runs(folder)
    runs.add("plain", door_1(folder, "plain", *SAME, checkpointing="selective"))
    runs.add("on a CPU", door_1(folder, "overlap", *SAME, checkpointing="selective"))
    saved = ["--checkpoint.enable", "--dump-folder", str(folder / "saved")]
    split = [*SAME, *EP_2, *saved, "--side-stream"]
    runs.add("split", door_1(folder, "overlap", *split, checkpointing="full"), ranks=2)
    return runs


def test_on_a_cpu_it_changes_a_message_alone(runs, folder):
    (plain,), (with_key,) = runs["plain"], runs["on a CPU"]
    assert_same_bits(plain, with_key)
    said = "flavor overlap: overlap_shared_experts = true changes nothing on the cpu"
    assert (folder / LOG).read_text().count(said) == 1


def test_with_streams_it_is_the_same_run_however_it_is_split(runs):
    """Recomputed whole, between two ranks that share experts and weights."""
    (plain,), (of_rank, _) = runs["plain"], runs["split"]
    # In three steps one layer, each time forward and recomputed.
    assert len(of_rank["started"]) == 3 * 2
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    assert any("shared_experts.gate" in name for name in differences)
    assert max(differences.values()) <= TOKENS * 2.0**-24
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


def test_a_checkpoint_is_that_of_the_flavor_without_it(runs, folder):
    record, _ = runs["split"]
    model = host().build_on_meta(load_flavor("plain", near=folder)).to_empty(device="cpu")
    step = folder / "saved" / "checkpoint" / "step-3"
    dcp.load(state := dict(model.named_parameters()), checkpoint_id=str(step), no_dist=True)
    assert {name: digest(each.detach()) for name, each in state.items()} == record["parameters"]
