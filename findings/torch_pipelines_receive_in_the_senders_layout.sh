#!/usr/bin/env bash
# torch 2.14.1: a pipeline over gloo cannot receive what a stage returns in another layout.
#
# A stage finds out shape and strides of what it will receive, and allocates it with those strides; gloo
# takes contiguous tensors alone (NCCL was not tried), and the run ends when the next stage first
# receives: "input tensor has to be contiguous". A stage that returns x.transpose(0, 1) is enough, with
# any schedule. torchtitan 0.3.0 gets there with sequence parallelism (spmd_types): a microbatch
# of one sequence runs, one of several does not, because the part of the sequence is cut out of dimension 1.
# Seen, on Linux x86-64, Python 3.11:
#
#     torch 2.14.1
#     the stage returns a contiguous tensor: runs
#     the stage returns a transposed tensor: input tensor has to be contiguous
#
# Exits 0 while that is so, 1 when torch has changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 numpy==2.4.6
cat > ranks.py <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe


class Stage(nn.Module):
    def __init__(self, transposes):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.transposes = transposes

    def forward(self, x):
        y = self.linear(x)
        return y.transpose(0, 1) if self.transposes else y


def said(transposes):
    rank = dist.get_rank()
    # The second stage gets [5, 2, 8], as a view of [2, 5, 8], if the first one transposes.
    stage = PipelineStage(Stage(transposes and rank == 0), rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, target: y.sum())
    x = torch.randn(4, 5, 8)
    try:
        schedule.step(x) if rank == 0 else schedule.step(target=torch.zeros(4))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "runs"


dist.init_process_group("gloo")
layout = sys.argv[1]
seen = said(layout == "transposed")
if dist.get_rank() == 1:
    print(f"the stage returns a {layout} tensor: {seen}", flush=True)
    expected = "runs" if layout == "contiguous" else "input tensor has to be contiguous"
    sys.exit(seen != expected)
PYTHON
"$python" -c 'import torch; print("torch", torch.__version__.partition("+")[0])'
for layout in contiguous transposed; do
    "$python" -m torch.distributed.run --standalone \
        --local-addr localhost --nproc-per-node 2 ranks.py "$layout"
done
