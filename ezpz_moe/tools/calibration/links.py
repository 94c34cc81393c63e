"""How long collectives take over a run's own process groups, measured with all groups at once.

Groups of neighbours, of two ranks up to all of them; with several nodes besides one rank of each.
Each stands after a product, as in a training step, whose own time does not count: ranks that have
computed arrive one after the other, and wait for the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ezpz_moe.tools.calibration.computing import Seconds, Work
from ezpz_moe.tools.planning.machine import Curve, Kind, Measured, Tier

_BYTES = (4 * 2**10, 64 * 2**10, 2**20, 16 * 2**20, 64 * 2**20)
"""Of the whole tensor."""
_WIDTH = 512


def collectives(clock: Seconds, device: torch.device, per_node: int) -> Iterator[Measured]:
    """Yield the seconds of every kind of collective, by its bytes."""
    world = dist.get_world_size()
    x_TD, weight_DD = (torch.randn(_WIDTH, _WIDTH, device=device) for _ in range(2))
    product = partial(torch.mm, x_TD, weight_DD)
    for size, stride in groups(world, per_node):
        mesh = init_device_mesh(
            device.type, (world // (size * stride), size, stride), mesh_dim_names=("a", "b", "c")
        )
        group = mesh.get_group("b")
        tier: Tier = "network" if size * stride > per_node else "node"
        # A send has two ends.
        kinds = [kind for kind in _KINDS if kind != "send" or size == 2]
        for kind in kinds:
            works = (_KINDS[kind](group, size, bytes_, device) for bytes_ in _BYTES)
            took = tuple(clock(work, product) for work in works)
            curve = Curve(sizes=tuple(map(float, _BYTES)), values=took)
            yield Measured(tier=tier, kind=kind, ranks=size, seconds=curve)


def groups(world: int, per_node: int) -> Iterator[tuple[int, int]]:
    """Yield size and stride of the groups to measure.

    Args:
        world: ranks of the run.
        per_node: of them on a node.
    """
    doubled = [2**power for power in range(1, world.bit_length()) if world % 2**power == 0]
    yield from ((size, 1) for size in dict.fromkeys([*doubled, world]))
    if 1 < per_node < world:
        yield world // per_node, per_node


def _all_gather(group: dist.ProcessGroup, size: int, bytes_: int, device: torch.device) -> Work:
    whole = torch.zeros(bytes_ // 4, device=device)
    shard = torch.zeros(bytes_ // 4 // size, device=device)
    return lambda: dist.all_gather_into_tensor(whole, shard, group=group)


def _reduce_scatter(group: dist.ProcessGroup, size: int, bytes_: int, device: torch.device) -> Work:
    whole = torch.zeros(bytes_ // 4, device=device)
    shard = torch.zeros(bytes_ // 4 // size, device=device)
    return lambda: dist.reduce_scatter_tensor(shard, whole, group=group)


def _all_reduce(group: dist.ProcessGroup, size: int, bytes_: int, device: torch.device) -> Work:
    whole = torch.zeros(bytes_ // 4, device=device)
    return lambda: dist.all_reduce(whole, group=group)


def _all_to_all(group: dist.ProcessGroup, size: int, bytes_: int, device: torch.device) -> Work:
    rows, sent = (torch.zeros(bytes_ // 4, device=device) for _ in range(2))
    return lambda: dist.all_to_all_single(rows, sent, group=group)


def _send(group: dist.ProcessGroup, size: int, bytes_: int, device: torch.device) -> Work:
    """From each first rank of two to the second."""
    whole = torch.zeros(bytes_ // 4, device=device)
    first, second = dist.get_process_group_ranks(group)

    def work() -> None:
        if dist.get_rank() == first:
            dist.send(whole, second, group=group)
        else:
            dist.recv(whole, first, group=group)

    return work


_KINDS: dict[Kind, Callable[..., Work]] = {
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-reduce": _all_reduce,
    "all-to-all": _all_to_all,
    "send": _send,
}
