#!/usr/bin/env bash
# torchtitan 0.3.0: under tensor parallelism a bias gradient of gpt_oss's experts grows with the ranks.
#
# Every rank of a tensor-parallel group adds the second bias of an expert to its part of the product, and
# GptOssGroupedExperts therefore divides the bias by their number, without its gradient: "keep the gradient
# unchanged in backward". It takes the number from the mesh of its weights, if these are DTensors. With
# parallelism.spmd_backend = "spmd_types", the default, and FSDP as the trainer applies it, the weights are
# plain tensors in forward: nothing is divided, and the gradients of the ranks, each of them whole, are
# added up. The MoE layer of the host's own debug model in bfloat16, all parameters zero but that bias, 8
# tokens, the gradient of the sum of the output: every column of the bias gets 8. Seen with torch 2.14.1,
# on Linux x86-64, Python 3.11:
#
#     spmd_types, 1 rank: divides by 1, gradient 8.0
#     spmd_types, 2 ranks: divides by 1, gradient 16.0
#     partial_dtensor, 2 ranks: divides by 2, gradient 8.0
#
# Exits 0 while that is so, 1 when torchtitan has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 torchtitan==0.3.0
cat > bias.py <<'PYTHON'
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchtitan.tools import utils as tools

tools.device_type = "cpu"  # a torch built for GPUs would make others say cuda
from torch.distributed.fsdp import fully_shard
from torchtitan.distributed import ParallelDims, utils
from torchtitan.distributed.full_dtensor import resolve_fsdp_mesh
from torchtitan.models import gpt_oss
from torchtitan.models.gpt_oss import moe as experts
from torchtitan.models.gpt_oss.sharding import set_gpt_oss_sharding_config

FOLDER, divisors = Path.cwd(), []
scale = experts.ScaleBiasForward.apply


class Noted:
    @staticmethod
    def apply(bias, divisor, dtype):
        divisors.append(divisor)
        return scale(bias, divisor, dtype)


experts.ScaleBiasForward = Noted


def gradient(rank, ranks, backend):
    place = f"{FOLDER}/{backend}.{ranks}"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=ranks)
    utils.set_spmd_backend(backend)
    degrees = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": ranks, "pp": 1, "ep": 1}
    dims = ParallelDims(**degrees, world_size=ranks, spmd_backend=backend)
    dims.build_mesh()
    config = gpt_oss.model_registry("debugmodel").model
    set_gpt_oss_sharding_config(config, enable_sp=False, enable_ep=False)
    moe = config.layers[0].moe.build().to(torch.bfloat16)
    moe.init_states(buffer_device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            parameter.fill_(float(name.endswith("mlp2_bias_ED")))
    moe.parallelize(dims)
    if backend == "spmd_types":
        mesh, of_data = resolve_fsdp_mesh(dims)
        fully_shard(moe, mesh=mesh, dp_mesh_dims=of_data)
    else:
        fully_shard(moe, mesh=dims.get_mesh("fsdp"))
    moe(torch.zeros(1, 8, config.dim, dtype=torch.bfloat16)).sum().backward()
    whole = moe.routed_experts.inner_experts.mlp2_bias_ED.grad.full_tensor()
    if rank == 0:
        torch.save((divisors, whole.sum(0).unique().tolist()), f"{place}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    found = {}
    for backend, ranks in (("spmd_types", 1), ("spmd_types", 2), ("partial_dtensor", 2)):
        mp.start_processes(gradient, (ranks, backend), nprocs=ranks, start_method="fork")
        (divisor,), (column,) = found[backend, ranks] = torch.load(f"{FOLDER}/{backend}.{ranks}.pt")
        print(f"{backend}, {ranks} rank{'s'[: ranks - 1]}: divides by {divisor}, gradient {column}")
    expected = [([1], [8.0]), ([1], [16.0]), ([2], [8.0])]
    raise SystemExit(list(found.values()) != expected)
PYTHON
GLOO_SOCKET_IFNAME=lo "$python" -W ignore bias.py
