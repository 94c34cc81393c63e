"""Whether neighbouring tokens need the same experts: local routing consistency, arXiv 2505.16056.

A segment is m consecutive tokens of a sequence; one begins at every position. Legend of the
suffixes: S = sequences, L = their length, K = experts of a token, E = experts, N = segments.
"""

from __future__ import annotations

import torch


def segment_counts(ids_SLK: torch.Tensor, num_experts: int, segment: int) -> torch.Tensor:
    """Return how many tokens of each segment go to each expert: integers [N, E], N = S (L - m + 1).

    The id E is that of no expert.

    Raises:
        ValueError: a segment is longer than a sequence, or has no tokens.
    """
    if not 1 <= segment <= ids_SLK.shape[1]:
        raise ValueError(f"a segment of {segment} in a sequence of {ids_SLK.shape[1]} tokens")
    # Sums over a sliding window, as differences of cumulative sums.
    chosen_SLE = times_chosen(ids_SLK, num_experts)
    # A zero in front: the segment at position 0 is then a difference like all others.
    sums_SLE = torch.nn.functional.pad(chosen_SLE.cumsum(1), (0, 0, 1, 0))
    return (sums_SLE[:, segment:] - sums_SLE[:, :-segment]).flatten(0, 1)


def times_chosen(ids_SLK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how often each token chooses each expert: integers [S, L, E]. The id E is of none."""
    return torch.nn.functional.one_hot(ids_SLK.long(), num_experts + 1).sum(2)[..., :num_experts]


def best_routing(counts_NE: torch.Tensor, segment: int) -> float:
    """Compute segment routing best performance (SRP): the best F1 of routing segments, not tokens.

    A segment router sends all m tokens of a segment to one set of experts. Compared with the
    model's choices, its precision and recall are best when it takes all (segment, expert) pairs
    whose count reaches some threshold; SRP is the F1 of the best threshold. It is 1 if all tokens
    of a segment choose the same experts.
    """
    counts = counts_NE.flatten()
    total = counts.sum()
    pairs = torch.bincount(counts, minlength=segment + 1)
    # For each threshold: how many pairs it takes, and how many choices these get right.
    taken = pairs.flip(0).cumsum(0).flip(0)
    right = (pairs * torch.arange(len(pairs))).flip(0).cumsum(0).flip(0)
    # F1 = 2 right / (choices of the segment router + choices of the model); a pair that the segment
    # router takes stands for `segment` choices.
    f1 = 2 * right.double() / (taken * segment + total)
    # Without threshold 0, which sends every segment to all experts.
    return f1[1:].max().item()


def best_hit_rates(counts_NE: torch.Tensor) -> torch.Tensor:
    """Compute the segment cache best hit rate (SCH) of every cache size, 1 to E: [E] in float64.

    For each segment, the cache holds the experts that it uses most; a hit is a choice of an expert
    in the cache. This is the definition of the paper's first version.
    """
    sorted_NE = counts_NE.sort(dim=1, descending=True).values.double()
    return sorted_NE.sum(0).cumsum(0) / counts_NE.sum()
