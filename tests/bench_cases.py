"""What the tests of ``ezpz-moe bench`` share: results that nobody measured."""

from __future__ import annotations

from ezpz_moe.tools.bench.results import Figures, Measured
from ezpz_moe.tools.bench.shapes import Shape


def figures(*both_ms: float, saved: int = 0, peak: int | None = 2**20, **others) -> Figures:
    """Of a contender whose forward takes a third of these times."""
    return Figures(
        forward_ms=[each / 3 for each in both_ms],
        both_ms=list(both_ms),
        saved_bytes=saved,
        peak_bytes=peak,
        syncs=others.pop("syncs", None),
        declares_syncs=others.pop("declares_syncs", None),
        **others,
    )


def measured(them: dict[str, Figures], **others) -> Measured:
    """A balanced bfloat16 layer of (E, D, F, R) = (2, 3, 5, 8) on the CPU unless said otherwise."""
    known = {
        "shape": Shape("tiny", 2, 3, 5, 8),
        "routing": "balanced",
        "counts": [4, 4],
        "dtype": "bfloat16",
        "device": "cpu",
        "allocator": "default",
        "allocator_variables": {},
        "left_out": {},
        "failed": {},
        "backends": [],
    }
    return Measured(figures=them, **(known | others))
