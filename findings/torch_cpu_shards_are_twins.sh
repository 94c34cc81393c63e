#!/usr/bin/env bash
# torch 2.14.1: on a CPU mesh the shards of a DTensor get the same random numbers.
#
# Two gloo ranks, one [8, 4] DTensor sharded over them, one seed. On a CUDA mesh torch draws the shards
# as parts of one whole. On a CPU mesh `normal_` draws on every rank from a generator with the same
# seed, so that the second half of the tensor equals the first; a general warning says that ops on
# random numbers may be wrong there. Whoever initialises a sharded model on CPU ranks (torchtitan does,
# after `to_empty`) trains a model whose halves are copies. Seen, on Linux x86-64, Python 3.11:
#
#     torch 2.14.1: shards equal: True
#
# Exits 0 while that is so, 1 when torch has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6
cat > ranks.py <<'PYTHON'
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, empty

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = empty(8, 4, device_mesh=mesh, placements=[Shard(0)]).normal_().full_tensor()
twins = torch.equal(whole[:4], whole[4:])
if dist.get_rank() == 0:
    print(f"torch {torch.__version__.partition('+')[0]}: shards equal: {twins}", flush=True)
dist.destroy_process_group()
raise SystemExit(not twins)
PYTHON
"$python" -m torch.distributed.run --standalone \
    --local-addr localhost --nproc-per-node 2 ranks.py
