"""How rows are distributed over the experts. This module does not import torch."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from fractions import Fraction

from ezpz_moe.errors import EzpzError

STANDARD = ("balanced", "empty25", "zipf0.5", "zipf1", "one_hot")
"""From even to as uneven as possible."""

_ZIPF = re.compile(r"zipf(\d+(?:\.\d+)?)")


def check_routing(routing: str) -> None:
    """Refuse a name that :func:`counts_of` does not know.

    Raises:
        EzpzError: the name is unknown.
    """
    if routing not in STANDARD and not _ZIPF.fullmatch(routing):
        raise EzpzError(
            f"--routing {routing!r}: unknown routing. Known: {', '.join(STANDARD)}; zipf takes "
            f"any exponent, for example zipf1.2."
        )


def counts_of(routing: str, experts: int, rows: int, top_k: int = 1) -> list[int]:
    """Return the rows of each expert; they sum to ``rows``. Equal arguments give equal counts.

    ``balanced``: the same for all. ``zipf<s>``: the expert of rank r gets a share of 1 / r^s.
    ``empty25``: a quarter of the experts (at least one, but never all) gets none, the others equal
    shares. ``one_hot``: one expert gets all. Which experts are busy is shuffled.

    A token's ``top_k`` experts differ, so no expert gets more than ``rows / top_k``: what is over
    goes to the others, in proportion to their shares. ``one_hot`` then has ``top_k`` busy experts.

    Raises:
        EzpzError: as :func:`check_routing`.
    """
    check_routing(routing)
    shares = _shares(routing, experts, top_k)
    # Sorted by load, neighbours would be equally busy, which suits batched_mm_padded more than real
    # routing does.
    random.Random(0).shuffle(shares)
    return _whole(shares, rows, rows // top_k)


def skew(counts: Sequence[int]) -> float:
    """Return the rows of the busiest expert as a multiple of the mean."""
    return max(counts) * len(counts) / max(1, sum(counts))


def _shares(routing: str, experts: int, top_k: int) -> list[float]:
    if zipf := _ZIPF.fullmatch(routing):
        return [rank ** -float(zipf[1]) for rank in range(1, experts + 1)]
    busy = {
        "balanced": experts,
        "empty25": max(top_k, experts - max(1, round(experts / 4))),
        "one_hot": top_k,
    }[routing]
    return [1.0] * busy + [0.0] * (experts - busy)


def _whole(shares: Sequence[float], rows: int, most: int) -> list[int]:
    """Split ``rows`` by the shares, at most ``most`` for each; leftovers go to large remainders."""
    wanted = _split(shares, rows, most)
    counts = [int(each) for each in wanted]
    # The most negative difference first: these lost most by rounding down. Whole ones lost nothing,
    # and so those that are full get nothing.
    by_remainder = sorted(range(len(counts)), key=lambda e: counts[e] - wanted[e])
    for expert in by_remainder[: rows - sum(counts)]:
        counts[expert] += 1
    return counts


def _split(shares: Sequence[float], rows: int, most: int) -> list[Fraction]:
    """Split ``rows`` in proportion to the shares, at most ``most`` for each."""
    # Exact arithmetic: with floats the counts could miss the total by one.
    exact = [Fraction(share) for share in shares]
    full: set[int] = set()
    while True:
        rest, weight = rows - most * len(full), sum(s for e, s in enumerate(exact) if e not in full)
        wanted = [
            Fraction(most) if e in full else share * rest / (weight or 1)
            for e, share in enumerate(exact)
        ]
        over = {e for e, each in enumerate(wanted) if each > most}
        if not over:
            return wanted
        # What they have too much may fill others, so once more.
        full |= over
