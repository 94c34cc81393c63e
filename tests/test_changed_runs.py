"""Models that differ from the host's, trained: real trainer, real ranks over gloo."""

from pathlib import Path

import pytest
from trainer_runs import EP_2, LOG, Runs, compare_gradients, door_1, job_folder

from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(presumed_host()) is not Titan03:
    pytest.skip("hands the batches of torchtitan 0.3 to it", allow_module_level=True)

pytestmark = pytest.mark.train

CHANGED = """
base = "qwen3/debugmodel_moe"
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
[change]
n_layers = 2
dim = 32
num_experts = 6
router_top_k = 2
moe_hidden_dim = 24
router_bias = true
[init]
experts = "kaiming_uniform"
residual = "depth"
"""
SAME = [
    "--same-sequences",
    *("--training.global-batch-size", "4", "--training.local-batch-size", "1"),
    *("--training.seq-len", "64"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return job_folder(tmp_path_factory.mktemp("changed"))


@pytest.fixture(scope="module")
def runs(folder: Path) -> Runs:
    (folder / "changed.toml").write_text(CHANGED)
    (folder / "dense.toml").write_text('dense_baseline_of = "changed"\n')
    runs = Runs(folder)
    runs.add("one rank", door_1(folder, "changed", *SAME))
    runs.add("expert parallel", door_1(folder, "changed", *SAME, *EP_2), ranks=2)
    runs.add("dense", door_1(folder, "dense", *SAME))
    return runs


ROUNDING = 4 * 64 * 2.0**-24
"""Of a sum over a step's tokens in float32, in whichever order."""


def test_ranks_train_a_changed_model_as_one_does(runs: Runs) -> None:
    """Sharded gate, experts and dispatcher have the changed sizes, and start with one's values."""
    (one,), ranks = runs["one rank"], runs["expert parallel"]
    assert one["backends"] == ["for_loop"] * 2
    for each in ranks:
        assert each["first_parameters"] == one["first_parameters"]
        assert len(each["losses"]) == 3
        assert each["losses"] == pytest.approx(one["losses"], rel=ROUNDING)
    differences = compare_gradients(ranks[0]["gradients"], one["gradients"])
    assert {name: each for name, each in differences.items() if each > ROUNDING} == {}
    assert one["losses"][-1] < one["losses"][0]


def test_a_dense_baseline_trains(runs: Runs, folder: Path) -> None:
    (dense,), (one,) = runs["dense"], runs["one rank"]
    assert dense["losses"] == sorted(dense["losses"], reverse=True)
    assert len(dense["losses"]) == 3
    assert dense["experts"] == []
    assert not any("moe" in name for name in dense["first_parameters"])
    same = dense["first_parameters"].keys() & one["first_parameters"].keys()
    assert "layers.1.attention.wo.weight" in same
    log = (folder / LOG).read_text()
    assert "flavor dense is dense, with the FLOPs per token of changed: an FFN of hidden" in log
    assert "dense: 2 layers, all dense." in log
