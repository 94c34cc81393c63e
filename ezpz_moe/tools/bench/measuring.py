"""Measure the times, bytes and waits of contenders at one layer.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from ezpz_moe.compute import tuning
from ezpz_moe.compute.backends import auto
from ezpz_moe.compute.reference import Case
from ezpz_moe.tools.bench.checking import Truth, WrongOutputError, truth_of
from ezpz_moe.tools.bench.contender import Contender, Prepared
from ezpz_moe.tools.bench.results import Figures
from ezpz_moe.tools.bench.routed_case import RoutedCase

Tick = Callable[[str], None]
"""Called with the name of what is done next."""


def measure(
    contenders: Sequence[Contender], case: Case | RoutedCase, repeats: int, tick: Tick
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Measure all contenders; return their figures, and the errors of those that failed.

    They take turns, and each turn begins with another contender: a busy machine slows all alike.
    The runs that count bytes come first and warm up, as does the first turn. Earlier choices of
    ``auto``, for another load or in another hour, do not count: it measures again.
    """
    auto.forget()
    with tuning.elsewhere():
        return _measure(contenders, case, repeats, tick)


def _measure(
    contenders: Sequence[Contender], case: Case | RoutedCase, repeats: int, tick: Tick
) -> tuple[dict[str, Figures], dict[str, str]]:
    truth = truth_of(case)
    figures: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    ready: dict[str, tuple[Prepared, Tensor]] = {}
    for contender in contenders:
        tick(contender.name)
        try:
            ready[contender.name], figures[contender.name] = _untimed(contender, case, truth)
        except Exception as error:  # report a contender that breaks, and still run the others
            failed[contender.name] = _in_a_line(error)
    order = deque(ready)
    for turn in range(1 + repeats):
        for name in order:
            tick(name)
            forward_ms, both_ms = milliseconds(*ready[name])
            # The first turn warms up caches and clocks.
            if turn > 0:
                figures[name].forward_ms.append(forward_ms)
                figures[name].both_ms.append(both_ms)
        # Another contender begins the next turn, so none always runs on a warm or a cool machine.
        order.rotate()
    return figures, failed


def ticks(contenders: Sequence[Contender], repeats: int) -> int:
    """Return how often :func:`measure` ticks if none breaks."""
    return len(contenders) * (2 + repeats)


def milliseconds(prepared: Prepared, grad: Tensor) -> tuple[float, float]:
    """Return the milliseconds of forward, and of forward and backward, from one run.

    ``grad`` arrives at the output, and is in its dtype.

    Uses the device's own clock where there is one. Ends when the gradients have been returned.
    """
    device = grad.device
    if device.type == "cpu":
        start = time.perf_counter()
        output = prepared.forward()
        between = time.perf_counter()
        # Not backward(), which adds to .grad: from the second turn on it would time an addition.
        torch.autograd.grad(output, prepared.inputs, grad)
        end = time.perf_counter()
        return (between - start) * 1e3, (end - start) * 1e3
    of_device = getattr(torch, device.type)
    before, between_, after = (of_device.Event(enable_timing=True) for _ in range(3))
    before.record()
    output = prepared.forward()
    # An event is recorded in the device's queue, without waiting for what is in it.
    between_.record()
    torch.autograd.grad(output, prepared.inputs, grad)
    after.record()
    # The only wait of this clock: until then the host may run ahead, as in training.
    after.synchronize()
    # Of events, elapsed_time() is in milliseconds already.
    return before.elapsed_time(between_), before.elapsed_time(after)


def saved_bytes(prepared: Prepared) -> tuple[int, Tensor]:
    """Return the bytes that forward saves for backward, and the output.

    Every storage counts once and in full. Inputs, weights and constants do not count: they stay in
    memory anyway.
    """
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # keep it alive, or its address could be reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = prepared.forward()
    for tensor in (*prepared.inputs, *prepared.constants):
        saved.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values()), output


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most bytes that ``work`` holds on the device at a time, beyond those held before.

    On the CPU this is what torch's profiler sees of its allocator, not what the C library keeps or
    wastes, or a kernel library allocates by itself. None if the device does not tell.
    """
    if device.type == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or its log says that it starts and stops
        with profile(profile_memory=True, use_kineto=True) as profiled:
            result = work()
        # Deleted only now: the gradients count as held until the end.
        del result
        return _most_at_a_time(profiled)
    of_device = getattr(torch, device.type)
    if not hasattr(of_device, "max_memory_allocated"):
        return None
    of_device.synchronize()
    of_device.reset_peak_memory_stats()
    before = of_device.memory_allocated()
    work()
    of_device.synchronize()
    return of_device.max_memory_allocated() - before


def _most_at_a_time(profiled: profile) -> int:
    """Return the peak of the bytes allocated while the profiler was on.

    Ignores an address that was not: its size comes from an earlier profile that saw it allocated.
    """
    sizes: dict[int, int] = {}
    held = most = 0
    # By time: the tree of events is not in that order, on which the peak depends.
    for event in sorted(_allocations(profiled), key=lambda event: event.start_time_ns):
        address, nbytes = event.extra_fields.ptr, event.extra_fields.alloc_size
        if nbytes > 0:
            sizes[address] = nbytes
            held += nbytes
            most = max(most, held)
        else:
            held -= sizes.pop(address, 0)
    return most


def _allocations(profiled: profile) -> Iterator[Any]:
    waiting = profiled.kineto_results.experimental_event_tree()
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag.name == "Allocation":
            yield event


def syncs(work: Callable[[], Any], device: torch.device) -> int | None:
    """Count how often ``work`` waits for the device; None if torch cannot tell."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # torch warns at each synchronizing call; there is no counter.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in caught)


def _untimed(
    contender: Contender, case: Case | RoutedCase, truth: Truth
) -> tuple[tuple[Prepared, Tensor], Figures]:
    """Measure all figures except the times; return first what :func:`milliseconds` takes."""
    prepared = contender.prepare(case)
    saved, output = saved_bytes(prepared)
    # A contender may compute in another dtype than the case's.
    grad = truth.grad.to(output.dtype)
    dropped = 0.0
    if contender.computes_layer:
        dropped = truth.dropped(contender, prepared, output)
    del output

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(prepared.forward(), prepared.inputs, grad)

    both()  # what compiles, tunes or loads the first time must not count towards the peak
    figures = Figures(
        forward_ms=[],
        both_ms=[],
        saved_bytes=saved,
        peak_bytes=peak_bytes(both, grad.device),
        syncs=syncs(both, grad.device),
        declares_syncs=contender.declares_syncs,
        dropped=dropped,
    )
    return (prepared, grad), figures


def _in_a_line(error: Exception) -> str:
    # Compilers report over many lines.
    words = " ".join(str(error).split())
    return words if isinstance(error, WrongOutputError) else f"{type(error).__name__}: {words}"
