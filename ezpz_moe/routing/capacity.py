"""Choices beyond an expert's capacity: which ones a rank leaves out before it sends its tokens.

Legend of the suffixes: :mod:`ezpz_moe.routing`; N = T * K choices.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor


def capacity(choices: int, experts: int, *, factor: float, least: int) -> int:
    """Return how many of a rank's choices an expert takes: its even share times ``factor``.

    The share is one of the rank's own choices among all experts, wherever those are. So the same
    tokens are dropped however many ranks share the experts, and an expert never gets more than
    this number from each rank.

    Args:
        choices: N, of all tokens of the rank.
        experts: what they are spread over, zero-computation experts included.
        factor: above 0.
        least: the result is at least this, whatever the factor says.
    """
    # A factor above the number of experts changes nothing. Limiting it first keeps the product
    # finite: ceil(inf) raises.
    return max(ceil(min(factor, experts) * choices / experts), least)


def beyond_capacity(
    ids_TK: Tensor, weights_TK: Tensor, *, experts: int, capacity: int, by_weight: bool
) -> Tensor:
    """Return bool [T, K]: the choices that their expert has no place for.

    No gradient, no device sync, the same bits on a rerun.

    Args:
        ids_TK: int64 expert ids. Those from ``experts`` on need no place.
        weights_TK: their weights; ties go to the earlier token.
        experts: those that have a capacity.
        capacity: places of an expert.
        by_weight: whether the choices of the highest weights have precedence, or the first ones.
    """
    ids_N = ids_TK.flatten()
    order_N = torch.arange(ids_N.numel(), device=ids_N.device)
    if by_weight:
        order_N = weights_TK.detach().flatten().argsort(descending=True, stable=True)
    # Stable: an expert's choices become neighbours and keep their order.
    order_N = order_N[ids_N[order_N].argsort(stable=True)]
    expert_N = ids_N[order_N].clamp(max=experts)
    counts_E1 = torch.zeros(experts + 1, dtype=torch.int64, device=ids_N.device)
    counts_E1 = counts_E1.scatter_add(0, expert_N, torch.ones_like(expert_N))
    starts_E1 = counts_E1.cumsum(0) - counts_E1
    place_N = torch.arange(ids_N.numel(), device=ids_N.device) - starts_E1[expert_N]
    is_beyond_N = (place_N >= capacity) & (expert_N < experts)
    return torch.zeros_like(is_beyond_N).scatter(0, order_N, is_beyond_N).view_as(ids_TK)
