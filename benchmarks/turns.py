"""Timing functions in turns, for the scripts beside this one; ``ezpz-moe bench`` times layers."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

_TURNS = 40
_WARM_UP = 2

Name = TypeVar("Name", bound=Hashable)


def medians(
    timed: Mapping[Name, Callable[[], object]], before: Callable[[], object] | None = None
) -> dict[Name, float]:
    """Milliseconds on the CPU by name. Each turn begins with another one.

    Args:
        before: called before each, untimed.
    """
    milliseconds: dict[Name, list[float]] = {name: [] for name in timed}
    order = deque(timed)
    for _ in range(_WARM_UP + _TURNS):
        for name in order:
            if before:
                before()
            start = time.perf_counter()
            timed[name]()
            milliseconds[name].append((time.perf_counter() - start) * 1e3)
        order.rotate()
    return {name: statistics.median(each[_WARM_UP:]) for name, each in milliseconds.items()}
