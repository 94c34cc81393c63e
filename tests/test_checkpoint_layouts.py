"""The experts since September 2026, gate and up in one tensor, made of the older ones and back."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import fork_server
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import (
    GATED,
    GPT_OSS,
    MLP1_BIAS,
    MLP1_WEIGHT,
    MLP2_BIAS,
    MLP2_WEIGHT,
    OTHERS,
    THREE,
    assert_same_checkpoint,
    loaded,
    trained,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from trainer_runs import TORCHRUN

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.plan import make_plan
from ezpz_moe.tools.checkpoints.remapping import remap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")

ROUTED = "layers.1.moe.routed_experts"
W13, W2 = f"{ROUTED}.w13.weight", f"{ROUTED}.w2.weight"
EQUAL = {"rtol": 0, "atol": 0, "equal_nan": True}


def test_one_tensor_holds_w1_and_w3_in_one(tmp_path) -> None:
    state = trained()
    dcp.save(state, checkpoint_id=tmp_path / "source")
    done = remap(tmp_path / "source", tmp_path / "main", "2026_09")
    assert done.changed == 3 * (1 + 3 + 2), "a weight, three states and two settings of each"
    new, old = loaded(tmp_path / "main"), state["optimizer"]
    w1, w2, w3 = THREE
    torch.testing.assert_close(new[W13], torch.stack((state[w1], state[w3]), 1), **EQUAL)
    torch.testing.assert_close(new[W2], state[w2], **EQUAL)
    for moment in ("exp_avg", "exp_avg_sq"):
        both = torch.stack([old[f"state.{name}.{moment}"] for name in (w1, w3)], 1)
        torch.testing.assert_close(new["optimizer"][f"state.{W13}.{moment}"], both, **EQUAL)
    assert new["optimizer"][f"state.{W13}.step"] == 7
    assert new["optimizer"][f"param_groups.{W13}.betas"] == (0.9, 0.95)
    assert not [name for name in (*new, *new["optimizer"]) if "inner_experts" in name]
    for name in OTHERS:
        torch.testing.assert_close(new[name], state[name], **EQUAL)


def test_gpt_oss_has_gate_and_up_in_turn(tmp_path) -> None:
    state = trained(GPT_OSS)
    dcp.save(state, checkpoint_id=tmp_path / "source")
    done = remap(tmp_path / "source", tmp_path / "main", "2026_09")
    assert done.changed == 4 * (1 + 3 + 2), "a weight, three states and two settings of each"
    new, moments = loaded(tmp_path / "main"), ("exp_avg", "exp_avg_sq")
    old = state | {
        f"{m} {name}": state["optimizer"][f"state.{name}.{m}"] for m in moments for name in GPT_OSS
    }
    new |= {
        f"{m} {ROUTED}.{name}": new["optimizer"][f"state.{ROUTED}.{name}.{m}"]
        for m in moments
        for name in ("w13.weight", "w13.bias", "w2.weight", "w2.bias")
    }
    for kind in ("", "exp_avg ", "exp_avg_sq "):
        for name, mlp1 in (("weight", MLP1_WEIGHT), ("bias", MLP1_BIAS)):
            gate, up = old[kind + mlp1][:, ::2], old[kind + mlp1][:, 1::2]
            torch.testing.assert_close(
                new[f"{kind}{ROUTED}.w13.{name}"], torch.stack((gate, up), 1), **EQUAL
            )
        for name, mlp2 in (("weight", MLP2_WEIGHT), ("bias", MLP2_BIAS)):
            torch.testing.assert_close(new[f"{kind}{ROUTED}.w2.{name}"], old[kind + mlp2], **EQUAL)
    assert new["optimizer"][f"state.{ROUTED}.w13.bias.step"] == 7
    assert new["optimizer"][f"param_groups.{W13}.betas"] == (0.9, 0.95)
    remap(tmp_path / "main", tmp_path / "back", "0.3")
    assert_same_checkpoint(tmp_path / "source", tmp_path / "back")


SHARDED = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Shard, distribute_tensor
sys.path.insert(0, {tests!r})
import checkpoint_cases
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (2,))
state = checkpoint_cases.trained(checkpoint_cases.{experts})
for tensors in (state, state["optimizer"]):
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor) and value.dim():
            tensors[name] = distribute_tensor(value, mesh, [Shard({dim})])
dcp.save(state, checkpoint_id={folder!r})
dist.barrier()
os._exit(0)  # gloo's threads may abort a teardown, see ezpz_moe.train
"""


@pytest.mark.ranks
@pytest.mark.parametrize(("experts", "shards"), [("GATED", 4), ("GPT_OSS", 2)])
@pytest.mark.parametrize("dim", [0, 1])
def test_every_shard_is_carried_there_and_back(tmp_path, dim, experts, shards) -> None:
    """E = 5 experts on two ranks: shards of 3 and 2; or halves of every expert."""
    script = tmp_path / "save.py"
    source = tmp_path / "source"
    values = {"folder": str(source), "dim": dim, "tests": str(Path(__file__).parent)}
    script.write_text(SHARDED.format(experts=experts, **values))
    python = fork_server.python()
    command = [python, *TORCHRUN, "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHON_EXEC": python})
    assert inspect(source).files == 2
    remap(source, tmp_path / "main", "2026_09")
    new = loaded(tmp_path / "main")
    if experts == "GATED":
        state = trained(GATED)
        gate, up = state[THREE[0]], state[THREE[2]]
    else:
        mlp1 = trained(GPT_OSS)[MLP1_WEIGHT]
        gate, up = mlp1[:, ::2], mlp1[:, 1::2]
    torch.testing.assert_close(new[W13], torch.stack((gate, up), 1), **EQUAL)
    assert len(storage.read_metadata(tmp_path / "main").state_dict_metadata[W13].chunks) == shards
    remap(tmp_path / "main", tmp_path / "back", "0.3")
    assert_same_checkpoint(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "size", "shards", "source", "target", "message"),
    [
        (
            MLP1_WEIGHT,
            (4, 6, 8),
            [((0, 0, 0), (4, 3, 8)), ((0, 3, 0), (4, 3, 8))],
            "0.3",
            "2026_09",
            "between the rows of a gate and its up",
        ),
        (
            f"{ROUTED}.w13.bias",
            (4, 2, 3),
            [((0, 0, 0), (4, 1, 3)), ((0, 1, 0), (4, 1, 3))],
            "2026_09",
            "0.3",
            "gate without up",
        ),
    ],
    ids=["there", "back"],
)
def test_a_shard_that_would_be_none_is_refused(name, size, shards, source, target, message) -> None:
    boxes = [ChunkStorageMetadata(*map(torch.Size, box)) for box in shards]
    entries = {
        name: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), boxes),
        MLP2_BIAS: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 8)), []),
    }
    with pytest.raises(EzpzError, match=f"{name}: one of its shards .*{message}.* number of ranks"):
        make_plan(Metadata(entries, {}, {}), source, target)


def test_a_shard_of_both_halves_is_taken_apart(tmp_path) -> None:
    """As the host itself would save w13: both halves in one tensor."""
    w13, w2 = torch.randn(5, 2, 60, 40), torch.randn(5, 40, 60)
    step = {f"state.{W13}.step": torch.tensor(3.0), f"state.{W13}.exp_avg": -w13}
    dcp.save({W13: w13, W2: w2, "optimizer": step}, checkpoint_id=tmp_path / "step-3")
    contents = inspect(tmp_path / "step-3")
    assert (contents.generation, contents.experts) == ("2026_09", 5)
    remap(tmp_path / "step-3", tmp_path / "old", "0.2")
    old = loaded(tmp_path / "old")
    for name, expected in {"w1": w13[:, 0], "w3": w13[:, 1], "w2": w2}.items():
        assert torch.equal(old[f"layers.1.moe.experts.{name}"], expected)
    assert torch.equal(old["optimizer"]["state.layers.1.moe.experts.w3.exp_avg"], -w13[:, 1])
    assert old["optimizer"]["state.layers.1.moe.experts.w1.step"] == 3
    # Saving a view would save all that it is a view of.
    assert inspect(tmp_path / "old").bytes < 1.5 * inspect(tmp_path / "step-3").bytes


@pytest.mark.parametrize(
    ("entry", "value"), [("state.{}.step", torch.tensor(8.0)), ("param_groups.{}.lr", 2e-3)]
)
def test_what_is_one_since_2026_09_must_be_the_same_of_w1_and_w3(tmp_path, entry, value) -> None:
    state = trained()
    name = entry.format(THREE[2])
    assert name in state["optimizer"]
    state["optimizer"][name] = value
    dcp.save(state, checkpoint_id=tmp_path / "source")
    with pytest.raises(EzpzError, match="keeps one for both") as error:
        remap(tmp_path / "source", tmp_path / "target", "2026_09")
    assert f"optimizer.{name}" in str(error.value)
    assert f"optimizer.{entry.format(THREE[0])}" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
