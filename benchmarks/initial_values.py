"""What the initial values of one rank cost on several CPU ranks (torchtitan 0.3).

    python benchmarks/initial_values.py 500M

Each number of ranks stands for one of them, in a process of its own and pretended by torch's fake
group, so that the ranks' shares are those of FSDP and nothing is communicated. Printed are seconds
and peak memory of that rank's initialisation: the host's own, and with one rank's values.
"""

from __future__ import annotations

import multiprocessing
import sys
import time

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.cpu import CpuDeviceModule
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.initial_values import WholeModel

RANKS = (1, 2, 4, 8)


def main(flavor: str) -> None:
    check_host()
    build_on_meta = host().build_on_meta
    spawn = multiprocessing.get_context("fork")
    print(f"{flavor}, float32, on {CpuDeviceModule().get_device_name()}; torch {torch.__version__}")
    for ranks in RANKS:
        child = spawn.Process(target=_measure, args=(build_on_meta, flavor, ranks))
        child.start()
        child.join()


def _measure(build_on_meta, flavor: str, ranks: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    model = build_on_meta(load_flavor(flavor))
    whole = WholeModel(model)
    whole.remember_generator()
    largest = max(p.nbytes for p in model.parameters())
    _share_out(model, ranks)
    device = CpuDeviceModule()
    device.reset_peak_memory_stats()
    begun = psutil.Process().memory_info().rss
    seconds = [_seconds(lambda: _initialize(model, None))]
    peaks = [device.memory_stats()["active_bytes.all.peak"] - begun]
    if ranks > 1:
        device.reset_peak_memory_stats()
        seconds.append(_seconds(lambda: whole.give_values_to(model, _initialize)))
        peaks.append(device.memory_stats()["active_bytes.all.peak"] - begun)
    print(
        f"{ranks} ranks: the host's {seconds[0]:.1f} s, one rank's values {sum(seconds):.1f} s; "
        f"peak {' and '.join(f'{peak / 1e9:.2f}' for peak in peaks)} GB, "
        f"largest parameter {largest / 1e9:.2f} GB",
        flush=True,
    )


def _share_out(model: nn.Module, ranks: int) -> None:
    """Cut every parameter as FSDP does, without values."""
    mesh = init_device_mesh("cpu", (ranks,))
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            sizes, _ = compute_local_shape_and_global_offset(old.shape, mesh, [Shard(0)])
            local = torch.empty(sizes)
            shard = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=old.shape, stride=old.stride()
            )
            setattr(module, name, nn.Parameter(local if ranks == 1 else shard))


def _initialize(model, buffer_device) -> None:
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))


def _seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
