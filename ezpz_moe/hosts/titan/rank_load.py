"""What each rank's experts get under expert parallelism, and what is sent for it.

Legend: L = MoE layers, E = routed experts, R = ranks, N = experts of all layers.
"""

from __future__ import annotations

import os
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
    of_ranks_LR = torch.stack(
        [_of_ranks(counts_E, ep_mesh.size()) for counts_E in apart(of_group_N, layers)]
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


@torch.no_grad()
def rows_sent(
    layers: Sequence[Tensor], sent: Sequence[Tensor], parallel_dims: Any
) -> list[dict[str, int | None]]:
    """Return for each layer the record's fields of its rows: all, and those that leave their rank.

    A row is what goes to a rank: of a layer as one node a token, once for each rank; of a composed
    one an assignment. Those that leave their node are None where there is no other. Without fields
    if there is no expert parallelism.

    Args:
        layers: counts_E of each: assignments of this rank's own tokens.
        sent: sent_R of each: this rank's tokens for each rank; empty for a composed layer.
        parallel_dims: the host's. Collective over the ranks that count together.
    """
    ep_mesh = parallel_dims.get_optional_mesh("ep")
    if ep_mesh is None:
        return [{}] * len(layers)
    rows_LR = torch.stack(
        [
            sent_R if len(sent_R) else _of_ranks(counts_E, ep_mesh.size())
            for counts_E, sent_R in zip(layers, sent, strict=True)
        ]
    )
    of_group = torch.distributed.get_process_group_ranks(ep_mesh.get_group())
    own = torch.distributed.get_rank()
    leaves_2R = torch.tensor(
        [[rank != own for rank in of_group], [_node(rank) != _node(own) for rank in of_group]],
        device=rows_LR.device,
    )
    rows_L3 = torch.stack([rows_LR.sum(1), *((rows_LR * each).sum(1) for each in leaves_2R)], 1)
    for mesh in counting_meshes(parallel_dims):
        torch.distributed.all_reduce(rows_L3, group=mesh.get_group())
    has_nodes = _node(torch.distributed.get_world_size() - 1) > 0
    return [
        {
            "rows_dispatched": rows,
            "rows_off_rank": off_rank,
            "rows_off_node": off_node if has_nodes else None,
        }
        for rows, off_rank, off_node in rows_L3.tolist()
    ]


def _node(rank: int) -> int:
    """Return the number of a rank's node: launchers number the ranks of one node after another."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or torch.distributed.get_world_size()
    return rank // int(here)


def _of_ranks(counts_E: Tensor, ranks: int) -> Tensor:
    """Return the assignments of each rank's experts.

    The host's dispatchers give neighbours among the experts to one rank, equally many to each.
    """
    return counts_E.unflatten(0, (ranks, -1)).sum(-1)
