"""Values that move with the training step."""

from __future__ import annotations

import math

from ezpz_moe.config.routing_schema import Schedule


def value_at(schedule: Schedule, step: int) -> float:
    """The schedule's value in training step ``step``, counted from 1.

    >>> value_at(Schedule(start=2.0, end=1.0, steps=5), 3)
    1.5
    >>> value_at(Schedule(start=4.0, end=1.0, steps=5, shape="exponential"), 3)
    2.0
    """
    start, end = schedule.start, schedule.end
    progress = 1.0 if schedule.steps == 1 else min(1.0, max(0, step - 1) / (schedule.steps - 1))
    if progress == 1.0 or schedule.is_constant:
        return end
    match schedule.shape:
        case "linear":
            return start + (end - start) * progress
        case "exponential":
            return start ** (1 - progress) * end**progress
        case "cosine":
            return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2
