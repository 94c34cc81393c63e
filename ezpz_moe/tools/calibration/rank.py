"""What one rank of a calibration does: torchrun starts it as ``python -m ...calibration.rank``.

All ranks measure; the first one writes what was found, as JSON, to the file that is named.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch.distributed.elastic.multiprocessing.errors import record

from ezpz_moe.hosts.cpu import device_module
from ezpz_moe.tools import allocator
from ezpz_moe.tools import device as devices
from ezpz_moe.tools.calibration import computing, links
from ezpz_moe.tools.calibration.asked import Asked
from ezpz_moe.tools.planning.machine import Measured
from ezpz_moe.tools.verify import default_device

_PATIENCE = 300
"""Seconds to wait for another rank: it may have failed, and what it measures takes far less."""


@dataclass(frozen=True)
class Found:
    """What was measured. FLOP/s, bytes and seconds.

    Attributes:
        device: in words.
        kind: torch's name of it.
        ranks: of the run.
        per_node: of them on a node.
        memory: bytes that a rank has.
        products: FLOP/s by the FLOPs of one product.
        attention: FLOP/s.
        experts: backend -> FLOP/s by the rows of an expert.
        bandwidth: bytes in a second that a copy reads and writes.
        alone, overlap: as in :class:`.machine.Machine`.
        collectives: every one that was measured.
    """

    device: str
    kind: str
    ranks: int
    per_node: int
    memory: float
    products: dict[float, float]
    attention: float
    experts: dict[str, dict[float, float]]
    bandwidth: float
    alone: float
    overlap: float
    collectives: list[Measured]


@record  # torchrun then has the error of a rank that fails
def main() -> None:
    asked = TypeAdapter(Asked).validate_json(sys.argv[1])
    kind = default_device()
    device = torch.device(kind)
    if kind == "cpu":
        allocator.keep_freed_memory()  # as a run does
    else:
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    backend = dist.get_default_backend_for_device(kind)
    dist.init_process_group(backend, timeout=timedelta(seconds=_PATIENCE))
    try:
        found = _measured(asked, device)
        if dist.get_rank() == 0:
            Path(sys.argv[2]).write_bytes(TypeAdapter(Found).dump_json(found))
    finally:
        dist.destroy_process_group()


def _measured(asked: Asked, device: torch.device) -> Found:
    clock, dtype = computing.seconds_of(device), getattr(torch, asked.dtype)
    per_node = int(os.environ["LOCAL_WORLD_SIZE"])
    # A CPU's ranks share its memory.
    sharing = per_node if device.type == "cpu" else 1
    return Found(
        device=device_module(device.type).get_device_name(),
        kind=device.type,
        ranks=dist.get_world_size(),
        per_node=per_node,
        memory=devices.memory() / sharing,
        products=dict(computing.products(clock, device, dtype, asked.largest)),
        attention=computing.attention(clock, device, dtype, asked.seq_len),
        experts=dict(computing.experts(clock, device, dtype, asked.layer)) if asked.layer else {},
        bandwidth=computing.bandwidth(clock, device),
        alone=computing.alone(clock, device, dtype),
        overlap=computing.overlap(clock, device, dtype),
        collectives=list(links.collectives(clock, device, per_node)),
    )


if __name__ == "__main__":
    main()
