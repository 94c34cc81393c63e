"""Counters of what one token chooses together: pairs of experts, and the ranks that it goes to.

They stand still while activation checkpointing repeats a layer, as :mod:`.counters` do.

Legend of the suffixes: :mod:`ezpz_moe.routing`. S = sampled tokens, P = ranks of a group; here E =
routed experts alone.
"""

from __future__ import annotations

from itertools import count
from math import gcd

import torch
from torch import Tensor

from ezpz_moe.compute.sending import goes_to
from ezpz_moe.routing.counters import is_recomputation

SAMPLED = 4096
"""Tokens of a step whose pairs are counted, about: of each rank and layer."""

Pairs = tuple[tuple[int, int, int], ...]
"""``(a, b, times)`` with a < b, those chosen together most often first."""

_is_on = False
"""Whether the pairs of this step are counted: not of every step, most are in no record."""


def count_this_step(is_on: bool) -> None:
    """Say whether :func:`count_pairs` counts from now on, in all layers of this process."""
    global _is_on
    _is_on = is_on


def stride_of(tokens: int, length: int) -> int:
    """Return n, so that every n-th of a step's tokens makes a sample of at most ``SAMPLED``.

    No common factor with the ``length`` of a sequence: the sample would be of the same few
    positions in all of them.
    """
    return next(n for n in count(-(-tokens // SAMPLED)) if gcd(n, length) == 1)


# An operator, because a compiler would ask only once whether this step is counted.
@torch.library.custom_op("ezpz_moe::count_pairs", mutates_args=("pairs_EE", "sampled_1"))
def count_pairs(
    pairs_EE: Tensor, sampled_1: Tensor, ids_TK: Tensor, mask_T: Tensor, stride: int
) -> None:
    """Count how often two experts are chosen by one token, unless this is a recomputation.

    Args:
        pairs_EE: int32, symmetric; its diagonal is how often an expert is chosen. Added to.
        sampled_1: int64, how many tokens have been looked at. Added to.
        ids_TK: every token's choices; ids from E on are of no routed expert.
        mask_T: bool, False for padding.
        stride: of the tokens every so many are looked at.
    """
    if not _is_on or is_recomputation():
        return
    E, ids_SK, mask_S = len(pairs_EE), ids_TK[::stride], mask_T[::stride]
    chosen_SE1 = torch.zeros(len(ids_SK), E + 1, device=ids_TK.device)
    chosen_SE1.scatter_(1, ids_SK.clamp(max=E), 1.0)
    chosen_SE = chosen_SE1[:, :E] * mask_S.unsqueeze(1)
    # Sums of ones are exact in float32 below 2**24, in what autocast would make of them they are
    # not.
    with torch.autocast(device_type=ids_TK.device.type, enabled=False):
        pairs_EE.add_((chosen_SE.t() @ chosen_SE).to(pairs_EE.dtype))
    sampled_1.add_(mask_S.sum())


@torch.library.custom_op("ezpz_moe::count_sent", mutates_args=("sent_P",))
def count_sent(sent_P: Tensor, ids_TK: Tensor, mask_T: Tensor, experts: int) -> None:
    """Count the tokens that have experts on each rank, unless this is a recomputation.

    Args:
        sent_P: int64. Added to: a token counts once for each rank, whatever number of experts it
            has there.
        ids_TK: every token's choices; ids from ``experts`` on are of no routed expert.
        mask_T: bool, False for padding.
        experts: routed experts of all ranks, neighbours on one rank, equally many on each.
    """
    if not is_recomputation():
        ranks = len(sent_P)
        sent_P.add_((goes_to(ids_TK, experts // ranks, ranks) & mask_T).sum(1))


def top_pairs(pairs_EE: Tensor, most: int) -> Pairs:
    """Return the pairs that were chosen together most often, at most ``most``.

    Of those chosen equally often the ones with lower ids come first. Device syncs: one.

    Args:
        pairs_EE: as of :func:`count_pairs`.
        most: how many.
    """
    E = len(pairs_EE)
    times_N = pairs_EE.triu(1).flatten().long()
    # No two keys are alike, so that every machine finds the same pairs.
    keys_N = times_N * E * E + torch.arange(E * E - 1, -1, -1, device=pairs_EE.device)
    found = keys_N.topk(min(most, E * E)).values.tolist()
    split = [(key // (E * E), E * E - 1 - key % (E * E)) for key in found]
    return tuple((place // E, place % E, times) for times, place in split if times)
