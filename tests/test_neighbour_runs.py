"""Models of the host train on the CPU with every backend that it has, one step each.

By a flavor with ``base``, and deepseek_v3 with MTP by the override, which is its door. The host's
other configs by the override are those of ``tests/hosts/test_training.py``.
"""

import dialect
import pytest
import torch
from trainer_runs import OneRank, door_1, job_folder

from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(host()) is not Titan03:
    pytest.skip("models of torchtitan 0.3.0", allow_module_level=True)

pytestmark = pytest.mark.train

BASES = {
    "deepseek_v3": "deepseek_v3/debugmodel",
    "gpt_oss": "gpt_oss/debugmodel",
    "kimi_k2_7": "kimi_k2_7/debugmodel",
    "qwen3": "qwen3/debugmodel_moe",
}
MTP = "deepseek_v3 with MTP"
ON_THE_CPU = [
    name
    for name in backend_names()
    if not get_backend(name).why_not(torch.device("cpu"), torch.float32)
]
IN_SHORT = {("kimi_k2_7", "for_loop")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> OneRank:
    folder = job_folder(tmp_path_factory.mktemp("neighbours"))
    dialect.write_text(folder)
    runs = OneRank(folder)
    for model, base in BASES.items():
        (folder / f"{model}.toml").write_text(f'base = "{base}"\n')
        flags = [*dialect.SHORT, *dialect.precision(model), "--training.steps", "1"]
        for backend in ON_THE_CPU:
            runs.add((model, backend), door_1(folder, f"{model}_sdpa_{backend}", *flags))
    for backend in ON_THE_CPU:
        arguments = dialect.with_backend("deepseek_v3", backend, folder, steps=1)
        place = arguments.index("deepseek_v3_debugmodel")
        arguments[place] = "deepseek_v3_debugmodel_mtp"
        runs.add((MTP, backend), arguments)
    return runs


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        pytest.param(model, name, marks=() if (model, name) in IN_SHORT else pytest.mark.full)
        for model in (*BASES, MTP)
        for name in ON_THE_CPU
    ],
)
def test_a_model_of_the_host_trains_with_a_backend(runs, model, backend):
    record = runs[model, backend]
    assert set(record["backends"]) == {backend}
    assert all(torch.isfinite(torch.tensor(record["losses"])))
    changed = {
        name
        for name, digest in record["parameters"].items()
        if digest != record["first_parameters"][name]
    }
    experts = {name for name in record["parameters"] if ".routed_experts." in name}
    assert experts
    assert experts <= changed
    # What text does not reach stays as it is, and whatever it reaches learns.
    assert not any("vision_encoder" in name for name in changed)
