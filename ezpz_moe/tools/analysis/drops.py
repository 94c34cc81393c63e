"""What a capacity factor would drop: OpenMoE, arXiv 2402.01739, section 4 ("drop towards the end").

Legend of the suffixes: S = sequences, L = their length, K = experts of a token, E = experts,
P = parts of a sequence.
"""

from __future__ import annotations

import math

import torch

from ezpz_moe.tools.analysis.consistency import times_chosen


def capacity(length: int, top_k: float, num_experts: int, factor: float) -> int:
    """Return how many of a sequence's tokens fit: ceil(factor L K / E), arXiv 2006.16668.

    Args:
        top_k: experts of a token, K; their mean number where it differs.
    """
    return math.ceil(factor * length * top_k / num_experts)


def dropped(ids_SLK: torch.Tensor, num_experts: int, factor: float) -> torch.Tensor:
    """Return which choices find their expert full: bool [S, L, K].

    Each sequence counts by itself, and its tokens come in order. An expert takes the first
    ``capacity`` of them.

    Args:
        ids_SLK: the chosen experts, none twice for a token; E is none of them.
        num_experts: E.
        factor: the capacity factor, above 0.
    """
    length = ids_SLK.shape[1]
    chosen_SLE = times_chosen(ids_SLK, num_experts)
    # For each expert, how many earlier tokens of the sequence chose it.
    # cumsum() counts the token itself too, which is not before itself.
    before_SLE = chosen_SLE.cumsum(1) - chosen_SLE
    # A token's place in its expert's queue, from 0; -1 in that of no expert.
    before_SLE1 = torch.nn.functional.pad(before_SLE, (0, 1), value=-1)
    rank_SLK = before_SLE1.gather(2, ids_SLK.long())
    top_k = chosen_SLE.sum().item() / ids_SLK[..., 0].numel()
    return rank_SLK >= capacity(length, top_k, num_experts, factor)


def by_position(dropped_SLK: torch.Tensor, chosen_SLK: torch.Tensor, parts: int) -> torch.Tensor:
    """Return the share of the choices dropped in each of ``parts`` equal stretches of the sequence.

    Args:
        dropped_SLK: bool.
        chosen_SLK: bool, False for a choice of no expert.
        parts: P.

    Returns:
        [P] in float64. If P does not divide L, some stretches are one position longer.
    """
    of_parts = zip(
        *(each.tensor_split(parts, dim=1) for each in (dropped_SLK, chosen_SLK)), strict=True
    )
    return torch.stack([share(*of_part) for of_part in of_parts])


def share(dropped_SLK: torch.Tensor, chosen_SLK: torch.Tensor) -> torch.Tensor:
    """Return the share of the choices that is dropped, in float64; 0 if there are none."""
    return dropped_SLK.sum().double() / chosen_SLK.sum().clamp(min=1)
