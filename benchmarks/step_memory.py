"""What the memory of a training step is made of: each allocation, by where in the step it is made.

The profiler of torch records every allocation inside the operators and the marks of FSDP that ask
for it. So this needs no guess at what a tensor is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

GATHERED = "weights that FSDP gathers"
REDUCED = "gradients that FSDP reduces"
BACKWARD = "gradients and temporaries of backward"
FORWARD = "made in forward"
FREED = "there before the step, and freed"


class Allocation(NamedTuple):
    """A block that is taken (bytes above 0), or given back."""

    when_ns: int
    address: int
    nbytes: int
    within: tuple[str, ...]
    """Names of the operators and marks around it, the outermost first."""


def composition(step: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Return the bytes of each kind since the step began, before the optimizer steps.

    Returns:
        When all of them together are the most; and the most that each kind has at any time.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    return at_the_peak(before_optimizer(found.profiler.kineto_results.experimental_event_tree()))


def at_the_peak(allocations: Iterable[Allocation]) -> tuple[Counter[str], Counter[str]]:
    """Return the bytes of each kind at the highest sum, and the highest of each kind."""
    kinds: dict[int, str] = {}
    now: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    highest: Counter[str] = Counter()
    for each in allocations:
        taken = each.nbytes > 0
        kind = kind_of(each.within) if taken else kinds.pop(each.address, FREED)
        if taken:
            kinds[each.address] = kind
        now[kind] += each.nbytes
        highest[kind] = max(highest[kind], now[kind])
        if now.total() > peak.total():
            peak = now.copy()
    return peak, highest


def kind_of(within: tuple[str, ...]) -> str:
    """Return what a block is for. FSDP works inside of backward too, so it is asked for first."""
    for kind, mark in (
        (REDUCED, "FSDP::post_backward"),
        (GATHERED, "FSDP::"),
        (BACKWARD, "autograd::engine"),
    ):
        if any(name.startswith(mark) for name in within):
            return kind
    return FORWARD


def before_optimizer(events: Iterable[Any]) -> list[Allocation]:
    """Return the allocations of a profile in their order, until the optimizer steps."""
    in_order = sorted(allocations(events, ()), key=lambda each: each.when_ns)
    ends = next(
        place
        for place, each in enumerate(in_order)
        if any(name.startswith("Optimizer.step#") for name in each.within)
    )
    return in_order[:ends]


def allocations(events: Iterable[Any], within: tuple[str, ...]) -> Iterator[Allocation]:
    for event in events:
        tag, fields = event.typed
        if tag == _EventType.Allocation:
            yield Allocation(event.start_time_ns, fields.ptr, fields.alloc_size, within)
        yield from allocations(event.children, (*within, event.name))
