"""What each rank's experts get under expert parallelism.

Legend: L = MoE layers, E = routed experts, R = ranks, N = experts of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.hosts.titan.routing import counting_meshes
from ezpz_moe.routing.counters import apart


@torch.no_grad()
def rank_max_over_mean(layers: Sequence[Tensor], parallel_dims: Any) -> list[float | None]:
    """Return for each layer the assignments of the busiest rank over the mean of the ranks.

    The others wait for that rank: 1 is even. None without expert parallelism, and for a layer to
    which nothing was assigned.

    Args:
        layers: counts_E of each: assignments of this rank's own tokens.
        parallel_dims: the host's. Collective over the ranks that count together.
    """
    ep_mesh = parallel_dims.get_optional_mesh("ep")
    if ep_mesh is None:
        return [None] * len(layers)
    of_group_N = torch.cat(list(layers))
    torch.distributed.all_reduce(of_group_N, group=ep_mesh.get_group())
    # The host's dispatchers give neighbours among the experts to one rank, equally many to each.
    of_ranks_LR = torch.stack(
        [
            counts_E.unflatten(0, (ep_mesh.size(), -1)).sum(-1)
            for counts_E in apart(of_group_N, layers)
        ]
    )
    total_L = of_ranks_LR[:, ep_mesh.get_local_rank()].clone()
    busiest_L, ranks = total_L.clone(), 1
    # Over all groups: each has all experts, for its own tokens.
    for mesh in counting_meshes(parallel_dims):
        torch.distributed.all_reduce(total_L, group=mesh.get_group())
        torch.distributed.all_reduce(
            busiest_L, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group()
        )
        ranks *= mesh.size()
    each_L = zip(busiest_L.tolist(), total_L.tolist(), strict=True)
    return [busiest * ranks / total if total else None for busiest, total in each_L]
