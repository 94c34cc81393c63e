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


def counts_of(routing: str, experts: int, rows: int) -> list[int]:
    """Return the rows of each expert; they sum to ``rows``. Equal arguments give equal counts.

    ``balanced``: the same for all. ``zipf<s>``: the expert of rank r gets a share of 1 / r^s.
    ``empty25``: a quarter of the experts (at least one, but never all) gets none, the others equal
    shares. ``one_hot``: one expert gets all. Which experts are busy is shuffled.

    Raises:
        EzpzError: as :func:`check_routing`.
    """
    check_routing(routing)
    shares = _shares(routing, experts)
    # Sorted by load, neighbours would be equally busy, which suits batched_mm_padded more than real
    # routing does.
    random.Random(0).shuffle(shares)
    return _whole(shares, rows)


def skew(counts: Sequence[int]) -> float:
    """Return the rows of the busiest expert as a multiple of the mean."""
    return max(counts) * len(counts) / max(1, sum(counts))


def _shares(routing: str, experts: int) -> list[float]:
    if zipf := _ZIPF.fullmatch(routing):
        return [rank ** -float(zipf[1]) for rank in range(1, experts + 1)]
    busy = {
        "balanced": experts,
        "empty25": max(1, experts - max(1, round(experts / 4))),
        "one_hot": 1,
    }[routing]
    return [1.0] * busy + [0.0] * (experts - busy)


def _whole(shares: Sequence[float], rows: int) -> list[int]:
    """Split ``rows`` by the shares; leftovers of rounding go to the largest remainders."""
    # Exact arithmetic: with floats the counts could miss the total by one.
    exact = [Fraction(share) for share in shares]
    wanted = [share * rows / sum(exact) for share in exact]
    counts = [int(each) for each in wanted]
    # The most negative difference first: these lost most by rounding down.
    by_remainder = sorted(range(len(counts)), key=lambda e: counts[e] - wanted[e])
    for expert in by_remainder[: rows - sum(counts)]:
        counts[expert] += 1
    return counts
