"""What backends have to reach, as data, and whether a file of ``ezpz-moe bench --out`` shows it.

    ezpz-moe bench --scale 4 --out figures.json
    python benchmarks/goals.py figures.json

A line for each goal that the file decides, with "met" or "MISSED"; exit code 1 if one is missed.
Where a goal refers to the stock layer and that is not measured, its three products stand in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ezpz_moe.tools.bench.results import DENSE, INDEXED, SINGLE_BUFFER, STOCK, Measured

Quantity = Literal["speed", "time", "saved", "saved per R F", "TFLOP/s", "syncs"]
Sizes = tuple[int, int, int, int]

BEST = "the best backend"
RECOMPUTING = "for_loop(recompute=true)"
_FORMER_NAMES = {"batched_mm_padded(single_buffer=true)": SINGLE_BUFFER}
"""Contenders' names in files written before December 2026 -> today's."""
_AT_LEAST = ("speed", "TFLOP/s")


@dataclass(frozen=True)
class Goal:
    """One figure that a contender has to reach, in every measurement that meets the conditions.

    Attributes:
        quantity: of forward and backward. "speed" and "time" are multiples of the other
        contender's, "saved" of its bytes for backward; "saved per R F" counts elements per R F.
        against: the other contender; None if the figure stands on its own.
        limit: the figure has to be at least this (speed, TFLOP/s), or else at most this.
        device, dtype, allocator, routing: where the goal applies; None for everywhere.
        shapes: (E, D, F, R) or names where it applies; empty for all.
        experts: the number of experts for which it applies.
    """

    contender: str
    quantity: Quantity
    limit: float
    against: str | None = None
    device: str | None = "cpu"
    dtype: str | None = None
    allocator: str | None = None
    routing: str | None = None
    shapes: Sequence[Sizes | str] = ()
    experts: int | None = None

    def holds_for(self, measured: Measured) -> bool:
        """Whether the goal applies to this measurement."""
        conditions = (
            (self.device, measured.device.partition(":")[0]),
            (self.dtype, measured.dtype),
            (self.allocator, measured.allocator),
            (self.routing, measured.routing),
            (self.experts, measured.shape.E),
        )
        shape = measured.shape
        return all(wanted in (None, found) for wanted, found in conditions) and (
            not self.shapes or shape.sizes in self.shapes or shape.name in self.shapes
        )


def _faster_than_indexed(speed: float, sizes: Sizes) -> Goal:
    return Goal("for_loop", "speed", speed, INDEXED, routing="balanced", shapes=(sizes,))


def _on_h200(quantity: Quantity, limit: float, against: str | None = None) -> Goal:
    shapes = ("olmoe", "qwen3_30b")
    return Goal("triton", quantity, limit, against, device="cuda", dtype="bfloat16", shapes=shapes)


GOALS = (
    _faster_than_indexed(2, (8, 1024, 3584, 2048)),
    _faster_than_indexed(9, (36, 1024, 704, 3072)),
    _faster_than_indexed(18, (64, 1024, 512, 4096)),
    _faster_than_indexed(35, (128, 1024, 384, 8192)),
    *(
        goal
        for name in ("for_loop", "grouped_mm_fused")
        for goal in (
            Goal(name, "speed", 1.0, STOCK),
            Goal(name, "saved", 0.5, STOCK),
            Goal(
                name, "time", 1.3, DENSE, dtype="float32", allocator="retain", shapes=("olmoe/4",)
            ),
            Goal(
                name, "time", 1.4, DENSE, dtype="bfloat16", allocator="retain", shapes=("olmoe/4",)
            ),
        )
    ),
    Goal(RECOMPUTING, "time", 1.25, "for_loop"),
    Goal("batched_mm_padded", "speed", 0.95, "grouped_mm", routing="balanced"),
    Goal("batched_mm_padded", "speed", 5, SINGLE_BUFFER, routing="zipf1", experts=128),
    Goal("batched_mm_padded", "time", 1.3, "grouped_mm", routing="zipf1", experts=128),
    Goal("batched_mm_padded", "saved per R F", 3, routing="zipf1", experts=128),
    Goal("auto", "speed", 0.95, BEST, device=None),
    _on_h200("speed", 1.3, STOCK),
    _on_h200("TFLOP/s", 400),
    _on_h200("syncs", 0),
)


def judged(measured: Measured) -> Iterator[str]:
    """One line for every goal that this measurement decides."""
    for goal in GOALS:
        reached = _reached(goal, measured) if goal.holds_for(measured) else None
        if reached is None:
            continue
        figure, what = reached
        at_least = goal.quantity in _AT_LEAST
        met = figure >= goal.limit if at_least else figure <= goal.limit
        yield (
            f"{goal.contender}: {figure:.3g} {what}, goal {'>=' if at_least else '<='} "
            f"{goal.limit:g}: {'met' if met else 'MISSED'}"
        )


def _reached(goal: Goal, measured: Measured) -> tuple[float, str] | None:
    """The figure and what it is; None if it was not measured."""
    name, against = goal.contender, _other(goal, measured)
    if name not in measured.figures or (goal.against and against is None):
        return None
    figures = measured.figures[name]
    ratio: float | None
    match goal.quantity:
        case "speed":
            ratio, what = measured.time_ratio(against, name), f"x the speed of {against}"
        case "time":
            ratio, what = measured.time_ratio(name, against), f"x the time of {against}"
        case "saved":
            assert against is not None
            ratio = figures.saved_bytes / measured.figures[against].saved_bytes
            what = f"x the bytes that {against} saves"
        case "saved per R F":
            of_one = measured.shape.R * measured.shape.F * measured.itemsize
            ratio, what = figures.saved_bytes / of_one, "x R F elements saved"
        case "TFLOP/s":
            ratio, what = measured.tflops(name), "TFLOP/s"
        case "syncs":
            ratio, what = figures.syncs, "device-host syncs"
    return None if ratio is None else (ratio, what)


def _other(goal: Goal, measured: Measured) -> str | None:
    """The contender that the goal compares with, by the name it was measured under."""
    if goal.against == STOCK:
        return measured.stock
    if goal.against == BEST:
        rivals = [
            name
            for name in measured.backends
            if name != goal.contender and not measured.figures[name].dropped
        ]
        return min(rivals, key=lambda name: measured.figures[name].median(), default=None)
    return goal.against if goal.against in measured.figures else None


def read(file: Path) -> list[Measured]:
    """What a file of ``bench --out`` has measured."""
    measured = json.loads(file.read_text())["measured"]
    return [TypeAdapter(Measured).validate_python(_renamed(each)) for each in measured]


def _renamed(value: Any) -> Any:
    """The value with today's names of contenders, which are keys and entries of lists."""
    match value:
        case dict():
            return {_FORMER_NAMES.get(key, key): _renamed(each) for key, each in value.items()}
        case list():
            return [_renamed(each) for each in value]
        case str():
            return _FORMER_NAMES.get(value, value)
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="written by ezpz-moe bench --out")
    verdicts = [
        f"{each.shape.name} {each.routing} {each.dtype} {each.allocator}: {verdict}"
        for each in read(parser.parse_args().file)
        for verdict in judged(each)
    ]
    print("\n".join(verdicts) or "this file decides no goal")
    return int(any(verdict.endswith("MISSED") for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
