"""What a comparison measured, as plain data, and the figures derived from it.

This module does not import torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ezpz_moe.tools.bench.routings import skew
from ezpz_moe.tools.bench.shapes import Shape

STOCK, PRODUCTS, INDEXED, DENSE = "stock", "stock_products", "indexed", "dense"
COPY = "stock_copy"
SINGLE_BUFFER = "single_buffer"

Layer = Literal["experts", "routed"]
"""The experts' FFN over sorted rows; or from tokens to tokens, with dispatch and combination."""

Pass = Literal["forward", "backward", "both"]
"""One of the two, or both together."""


@dataclass(frozen=True)
class Figures:
    """What was measured for one contender.

    Attributes:
        forward_ms, both_ms: milliseconds of forward, and of forward and backward, by turn.
        saved_bytes: what forward keeps for backward, without the inputs and weights themselves.
        peak_bytes: the most that forward and backward hold at a time, beyond inputs and weights;
            None if the device does not tell.
        syncs: how often forward and backward wait for the device, counted; None if that is not
            possible.
        declares_syncs: whether the contender says that it waits; None if it says nothing.
        dropped: share of the rows that are left out.
    """

    forward_ms: list[float]
    both_ms: list[float]
    saved_bytes: int
    peak_bytes: int | None
    syncs: int | None
    declares_syncs: bool | None
    dropped: float = 0.0

    def turns(self, timed: Pass) -> list[float]:
        match timed:
            case "forward":
                return self.forward_ms
            case "backward":
                pairs = zip(self.forward_ms, self.both_ms, strict=True)
                return [both - forward for forward, both in pairs]
        return self.both_ms

    def median(self, timed: Pass = "both") -> float:
        return statistics.median(self.turns(timed))

    def quartiles(self, timed: Pass = "both") -> tuple[float, float]:
        """Return the two values between which the middle half of the turns lies."""
        turns = self.turns(timed)
        if len(turns) == 1:
            return turns[0], turns[0]
        # inclusive: the turns are all there are, not a sample of a larger range.
        first, _, third = statistics.quantiles(turns, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Measured:
    """One layer with one routing: the figures of every contender, which took turns.

    Attributes:
        counts: rows of each expert.
        allocator: "default" or "retain", see :mod:`.plan`.
        allocator_variables: the memory settings in the environment of the measuring process.
        figures: by contender.
        left_out: contender -> why it is not among them.
        failed: contender -> what it raised.
        backends: the names in ``figures`` that are ours, or of a package that adds one.
        layer: what was computed.
        stock_saved_bytes: what torchtitan's routed layer saves for backward in this dtype, also
            where it is not measured; None for the experts' FFN, or without torchtitan.
    """

    shape: Shape
    routing: str
    counts: list[int]
    dtype: str
    device: str
    allocator: str
    allocator_variables: dict[str, str]
    figures: dict[str, Figures]
    left_out: dict[str, list[str]]
    failed: dict[str, str]
    backends: list[str]
    layer: Layer = "experts"
    stock_saved_bytes: int | None = None

    @property
    def itemsize(self) -> int:
        # Not asked of torch, which this module does not import.
        return {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}[self.dtype]

    @property
    def skew(self) -> float:
        return skew(self.counts)

    @property
    def stock(self) -> str | None:
        """The contender whose time stands for the host's: its layer, or what has its products."""
        return next((name for name in (STOCK, PRODUCTS, COPY) if name in self.figures), None)

    def time_ratio(
        self, above: str | None, below: str | None, timed: Pass = "both"
    ) -> float | None:
        """Return the median over turns of the ratio of two times: the machine is as busy for both.

        None if one of the two was not measured.
        """
        if above is None or below is None or not {above, below} <= self.figures.keys():
            return None
        # Pair the turns: a ratio of two medians would compare different moments of a busy machine.
        pairs = zip(self.figures[above].turns(timed), self.figures[below].turns(timed), strict=True)
        return statistics.median(a / b for a, b in pairs)

    def saved_ratio(self, name: str) -> float | None:
        """Return the bytes saved for backward, as a multiple of those of torchtitan's layer."""
        if not self.stock_saved_bytes:
            return None
        return self.figures[name].saved_bytes / self.stock_saved_bytes

    def tflops(self, name: str) -> float:
        """Return TFLOP/s of forward and backward."""
        # FLOP per millisecond is 1e3 FLOP/s, and 1e12 of these are a TFLOP/s.
        return self.shape.flops / self.figures[name].median() / 1e9

    def as_json(self) -> dict[str, Any]:
        """Return everything, with medians and ratios next to the turns."""
        document = asdict(self) | {"skew": self.skew, "stock": self.stock}
        for name, figures in document["figures"].items():
            mine = self.figures[name]
            figures["summary"] = {
                "forward_ms": mine.median("forward"),
                "both_ms": mine.median(),
                "both_ms_quartiles": list(mine.quartiles()),
                "tflops": self.tflops(name),
                "speed_of_stock": self.time_ratio(self.stock, name),
                "time_of_dense": self.time_ratio(name, DENSE),
                "speed_of_indexed": self.time_ratio(INDEXED, name),
                "saved_of_stock": self.saved_ratio(name),
            }
        return document


def document(results: Sequence[Measured], about: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return everything that was measured, as plain values."""
    content = {
        "command": command,
        "environment": about,
        "measured": [measured.as_json() for measured in results],
    }
    return {key: _rounded(each) for key, each in content.items()}


def _rounded(value: Any) -> Any:
    """Round to five digits: no clock is more precise."""
    match value:
        case Mapping():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
        # Integers stay as they are: bytes and rows are exact.
        case float():
            return float(f"{value:.5g}")
    return value
