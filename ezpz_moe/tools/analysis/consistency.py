"""Whether neighbouring tokens need the same experts: local routing consistency, arXiv 2505.16056.

A segment is m consecutive tokens of a sequence; every position begins one. Legend of the suffixes:
S = sequences, L = their length, K = experts of a token, E = experts, N = segments.
"""

from __future__ import annotations

import torch


def segment_counts(ids_SLK: torch.Tensor, num_experts: int, segment: int) -> torch.Tensor:
    """How many tokens of each segment go to each expert: integers [N, E], N = S (L - m + 1).

    Raises:
        ValueError: a segment is longer than a sequence, or has no token.
    """
    if not 1 <= segment <= ids_SLK.shape[1]:
        raise ValueError(f"a segment of {segment} in a sequence of {ids_SLK.shape[1]} tokens")
    chosen_SLE = torch.nn.functional.one_hot(ids_SLK.long(), num_experts).sum(2)
    sums_SLE = torch.nn.functional.pad(chosen_SLE.cumsum(1), (0, 0, 1, 0))
    return (sums_SLE[:, segment:] - sums_SLE[:, :-segment]).flatten(0, 1)


def best_routing(counts_NE: torch.Tensor, segment: int) -> float:
    """Segment routing best performance (SRP): the best F1 score of routing segments, not tokens.

    A segment router sends all m tokens of a segment to a set of experts. Measured against the
    model's choices, its precision and recall are best when it takes all pairs of a segment and an
    expert with a count of at least some threshold; SRP is the F1 of the best threshold. 1: all
    tokens of a segment choose alike.
    """
    counts = counts_NE.flatten()
    total = counts.sum()
    pairs = torch.bincount(counts, minlength=segment + 1)
    # From each threshold on: how many pairs are taken, and how many choices these have right.
    taken = pairs.flip(0).cumsum(0).flip(0)
    right = (pairs * torch.arange(len(pairs))).flip(0).cumsum(0).flip(0)
    f1 = 2 * right.double() / (taken * segment + total)
    return f1[1:].max().item()


def best_hit_rates(counts_NE: torch.Tensor) -> torch.Tensor:
    """Segment cache best hit rate (SCH) for every cache size, 1 to E: [E] in float64.

    The cache holds, for each segment, the experts that it uses most; a hit is a choice of an expert
    in the cache. As the first version of the paper defines it.
    """
    sorted_NE = counts_NE.sort(dim=1, descending=True).values.double()
    return sorted_NE.sum(0).cumsum(0) / counts_NE.sum()
