#!/usr/bin/env bash
# torchtitan 0.3.0: its chunked loss sends the head's gradients once per microbatch of a pipeline.
#
# torch's pipeline schedules hold FSDP's gradients back, and reduce-scatter them once in a step, after
# the last microbatch. torchtitan's ChunkedLossWrapper turns the head's synchronisation off and on again
# for its own chunks, whatever it was before: so the head is reduced for every microbatch, and gathered
# twice. Whoever counts on "once in a step" pays m and 2 m times for the largest matrix of the last stage.
# Two gloo ranks share a model of two FSDP groups, body and head, in a pipeline of one stage with 4
# microbatches; torch's profiler counts. Seen, on Linux x86-64, Python 3.11:
#
#     torchtitan 0.3.0, torch 2.14.1, 4 microbatches
#     head in the model, cross entropy: {'all-gathers': 2, 'reduce-scatters': 2}
#     chunked loss: {'all-gathers': 9, 'reduce-scatters': 5}
#
# Exits 0 while that is so, 1 when they have changed, 2 when packages could not be installed.
set -euo pipefail
source "$(dirname "$0")/environment.bash"
install torch==2.14.1 torchtitan==0.3.0 numpy==2.4.6
cat > ranks.py <<'PYTHON'
from collections import Counter
from importlib.metadata import version

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.profiler import ProfilerActivity, profile
from torchtitan.components.loss import ChunkedLossWrapper

MICROBATCHES = 4
KINDS = {
    "c10d::_allgather_base_": "all-gathers",
    "c10d::_reduce_scatter_base_": "reduce-scatters",
}


class Model(nn.Module):
    def __init__(self, keeps_head: bool):
        super().__init__()
        self.keeps_head = keeps_head
        self.body = nn.Linear(64, 64)
        self.head = nn.Linear(64, 128, bias=False)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return self.head(x) if self.keeps_head else x


def counted(chunked: bool) -> Counter:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "fsdp"))
    torch.manual_seed(0)
    model = Model(keeps_head=not chunked)
    for part in (model.head, model):
        fully_shard(part, mesh=mesh["fsdp"], reshard_after_forward=False)
    if chunked:
        loss = ChunkedLossWrapper(ChunkedLossWrapper.Config(num_chunks=2))
        loss.set_lm_head(model.head)

        def loss_fn(hidden, labels):
            return loss(hidden, labels)[0]
    else:

        def loss_fn(logits, labels):
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    stage = PipelineStage(model, 0, 1, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=loss_fn)
    x, labels = torch.randn(MICROBATCHES, 8, 64), torch.randint(128, (MICROBATCHES, 8))
    schedule.step(x, target=labels)  # the first step finds shapes
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        schedule.step(x, target=labels)
    return Counter(KINDS[each.name] for each in seen.events() if each.name in KINDS)


plain, chunked = counted(False), counted(True)
if dist.get_rank() == 0:
    print(f"torchtitan {version('torchtitan')}, torch {version('torch')}, {MICROBATCHES} microbatches")
    print("head in the model, cross entropy:", dict(plain))
    print("chunked loss:", dict(chunked), flush=True)
dist.destroy_process_group()
# Of the body one each, as without chunks.
once = {"all-gathers": 2, "reduce-scatters": 2}
often = {"all-gathers": 1 + 2 * MICROBATCHES, "reduce-scatters": 1 + MICROBATCHES}
raise SystemExit((plain, chunked) != (once, often))
PYTHON
"$python" -m torch.distributed.run --standalone \
    --local-addr localhost --nproc-per-node 2 ranks.py
