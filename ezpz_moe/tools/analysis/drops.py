"""What a capacity factor would drop: OpenMoE, arXiv 2402.01739, section 4 ("drop towards the end").

Legend of the suffixes: S = sequences, L = their length, K = experts of a token, E = experts,
P = parts of a sequence.
"""

from __future__ import annotations

import math

import torch


def capacity(length: int, top_k: int, num_experts: int, factor: float) -> int:
    """Return how many of a sequence's tokens fit: ceil(factor L K / E), arXiv 2006.16668."""
    return math.ceil(factor * length * top_k / num_experts)


def dropped(ids_SLK: torch.Tensor, num_experts: int, factor: float) -> torch.Tensor:
    """Return which choices find their expert full: bool [S, L, K].

    Each sequence counts by itself, and its tokens come in order. An expert takes the first
    ``capacity`` of them.

    Args:
        ids_SLK: the chosen experts, none twice for a token.
        num_experts: E.
        factor: the capacity factor, above 0.
    """
    _, length, top_k = ids_SLK.shape
    one_hot = torch.nn.functional.one_hot(ids_SLK.long(), num_experts)
    # For each expert, how many earlier tokens of the sequence chose it.
    # cumsum() counts the token itself too, which is not before itself.
    before_SLE = one_hot.sum(2).cumsum(1) - one_hot.sum(2)
    # A token's place in its expert's queue, from 0.
    rank_SLK = before_SLE.gather(2, ids_SLK.long())
    return rank_SLK >= capacity(length, top_k, num_experts, factor)


def by_position(dropped_SLK: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the share of the choices dropped in each of ``parts`` equal stretches of the sequence.

    Returns:
        [P] in float64. If P does not divide L, some stretches are one position longer.
    """
    at_L = dropped_SLK.double().mean(dim=(0, 2))
    return torch.stack([each.mean() for each in at_L.tensor_split(parts)])
