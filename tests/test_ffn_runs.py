"""Other FFNs in real runs of the trainer: sharded, split, compiled, recomputed, resumed.

All of it at once, in as few runs as show it: every run trains on the same sequences, from the same
initial values, so that each has the losses and gradients of the plain one.
"""

import pytest
from dialect import ON_0_2, SINCE_2026_08
from trainer_runs import EP_2, Runs, compare_gradients, door_1, job_folder

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

FLAVOR = """
inherits = "tiny"
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
SAME = ["--same-sequences", "--training.global-batch-size", "4"]
AOT = ["--compile.enable", "--compile.backend", "aot_eager"]
TP_2 = ["--parallelism.tensor-parallel-degree", "2", "--debug.spmd-typechecking"]
AFTER_2 = ["--checkpoint.enable", "--checkpoint.interval", "2"]

TOKENS = 4 * 128
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = job_folder(tmp_path_factory.mktemp("ffns"))
    (folder / "other.toml").write_text(FLAVOR)
    runs = Runs(folder)
    runs.add("plain", door_1(folder, "other", *SAME))
    expert_parallel = [*SAME, *EP_2, *AOT]
    job = door_1(folder, "other", *expert_parallel, checkpointing="selective")
    runs.add("expert parallel, fully sharded, compiled, selective", job, ranks=2)
    tensor_parallel = [*SAME, *TP_2, *AFTER_2, "--dump-folder", str(folder / "saved")]
    job = door_1(folder, "other", *tensor_parallel, checkpointing="full")
    runs.add("tensor parallel, types checked, full", job, ranks=2)
    resumed = [*SAME, *AFTER_2, "--dump-folder", str(folder / "saved")]
    runs.add("resumed", door_1(folder, "other", *resumed, "--checkpoint.load-step", "2"))
    return runs


SPLIT = [
    "expert parallel, fully sharded, compiled, selective",
    "tensor parallel, types checked, full",
]


@pytest.mark.parametrize("split", SPLIT)
def test_gradients_are_those_of_one_rank(runs, split):
    (plain,), (of_rank, _) = runs["plain"], runs[split]
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    assert any(name.endswith("b2_ED") for name in differences)
    assert max(differences.values()) <= TOKENS * 2.0**-24


@pytest.mark.parametrize("split", SPLIT)
def test_what_steps_make_of_biases_is_that_of_one_rank(runs, split):
    """A bias begins as zero: only later losses tell whether it is added once."""
    (plain,), (of_rank, _) = runs["plain"], runs[split]
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


def test_a_checkpoint_goes_on_however_it_was_split(runs):
    saved, (resumed,) = runs[SPLIT[1]][0], runs["resumed"]
    (loss,) = resumed["losses"]
    assert loss == pytest.approx(saved["losses"][-1], rel=TOKENS * 2.0**-24)
