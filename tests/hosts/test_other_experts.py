"""Experts that are no SwiGLU of one size, in real runs of a trainer later than torchtitan 0.3.

All keys of a flavor at once: sizes of their own, another activation, biases, a latent, scores on
inputs, a gate of the shared experts; and a ``[change]`` of the host's own model. On 0.3
``test_ffn_runs.py``, ``test_latent_runs.py`` and ``test_layer_size_runs.py`` have more of it.
"""

import math

import pytest
from dialect import SINCE_2026_08, SINCE_2026_09
from trainer_runs import EP_2, Runs, compare_gradients, door_1, job_folder

from ezpz_moe.hosts.detect import host

if SINCE_2026_09 or not SINCE_2026_08:
    pytest.skip(
        f"about torchtitan of August 2026, and the installed host is {host().name}; "
        "make test-hosts HOST=... runs these",
        allow_module_level=True,
    )

FLAVORS = {
    "other": """
inherits = "tiny"
n_layers = 3
n_heads = 4
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
expert_activation = "relu2"
expert_bias = true
ffn_activation = "geglu"
shared_hidden_dim = 96
shared_gate = true
moe_latent_dim = 24
router_scores = "before"
num_experts = [4, 8]
""",
    "changed": """
base = "qwen3/debugmodel_moe"
attention = "sdpa"
compute_backend = "for_loop"
expert_precision = "float32"
[change]
n_layers = 2
num_experts = 8
""",
}
TP_2 = ["--parallelism.tensor-parallel-degree", "2"]
TOKENS = 2 * 128
"""That a gradient, or a loss, adds up in float32, each addition with a rounding of 2**-24."""

pytestmark = [pytest.mark.train, pytest.mark.ranks]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    folder = job_folder(tmp_path_factory.mktemp("other"))
    runs = Runs(folder)
    for name, text in FLAVORS.items():
        (folder / f"{name}.toml").write_text(text)
        runs.add(f"{name}, plain", door_1(folder, name))
        runs.add(f"{name}, tensor parallel", door_1(folder, name, *TP_2), ranks=2)
        runs.add(f"{name}, expert parallel", door_1(folder, name, *EP_2), ranks=2)
    return runs


@pytest.mark.parametrize("flavor", FLAVORS)
def test_tensor_parallel_gradients_are_those_of_one_rank(runs, flavor):
    (plain,), (of_rank, _) = runs[f"{flavor}, plain"], runs[f"{flavor}, tensor parallel"]
    differences = compare_gradients(of_rank["gradients"], plain["gradients"])
    assert max(differences.values()) <= TOKENS * 2.0**-24
    assert of_rank["losses"] == pytest.approx(plain["losses"], rel=TOKENS * 2.0**-24)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_expert_parallel_ranks_learn_the_same(runs, flavor):
    one, other = runs[f"{flavor}, expert parallel"]
    assert one["losses"] == other["losses"]
    assert all(map(math.isfinite, one["losses"]))
    assert one["losses"][-1] < one["losses"][0]
