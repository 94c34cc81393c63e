"""Write ``torch-VERSION.metadata`` here, as the installed torch does for two ranks of a trainer.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/data/metadata/write.py
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

EXPERTS = "layers.1.moe.routed_experts.inner_experts"


def main() -> None:
    mesh = init_device_mesh("cpu", (2,))
    weights = {f"{EXPERTS}.{name}": (4, 2, 3) for name in ("w1_EFD", "w2_EDF", "w3_EFD")}
    state: dict = {
        name: distribute_tensor(torch.ones(size), mesh, [Shard(0)])
        for name, size in weights.items()
    }
    state["norm.weight"] = distribute_tensor(torch.ones(3).bfloat16(), mesh, [Replicate()])
    state["optimizer"] = {f"state.{name}.step": torch.tensor(7.0) for name in weights}
    state["optimizer"] |= {f"param_groups.{name}.betas": (0.9, 0.95) for name in weights}
    state["lr_scheduler"] = {"last_epoch": 7}
    state["dataloader"] = {f"dp_rank_{dist.get_rank()}": pickle.dumps({}), "world_size": 2}
    state["train_state"] = {"step": torch.tensor(7)}
    folder = Path(tempfile.gettempdir()) / "ezpz_moe_metadata" / "step-7"
    dcp.save(state, checkpoint_id=folder)
    if dist.get_rank() == 0:
        version = torch.__version__.partition("+")[0]
        target = Path(__file__).with_name(f"torch-{version}.metadata")
        shutil.copy(folder / ".metadata", target)
        shutil.rmtree(folder.parent)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
