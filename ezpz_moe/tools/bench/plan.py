"""A whole comparison: what to measure, and running it here or in its own process.

A process settles at its start how the C library keeps memory, so the ``retain`` allocator needs a
process with :data:`RETAIN` in its environment. ``default`` is measured in this process, with the
environment as it is.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from pydantic import TypeAdapter

from ezpz_moe import __version__
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.compute.reference import Case, random_case
from ezpz_moe.compute.tuning import allocator_variables, is_out_of_memory
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.installed import host_name, version
from ezpz_moe.tools.bench import contenders, routed
from ezpz_moe.tools.bench.contender import Contender
from ezpz_moe.tools.bench.measuring import Tick, measure, ticks
from ezpz_moe.tools.bench.results import COPY, PRODUCTS, STOCK, Figures, Layer, Measured
from ezpz_moe.tools.bench.routed_case import RoutedCase, random_routed_case
from ezpz_moe.tools.bench.routings import counts_of
from ezpz_moe.tools.bench.shapes import Shape

Allocator = Literal["default", "retain"]

Progress = Callable[[str, int], contextlib.AbstractContextManager[Tick]]
"""Takes what begins and how many steps it has; while it is open, it shows them."""

# The underscores at the end belong to glibc's names of these variables.
RETAIN = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "1"}
"""glibc: never take a single block from the system, and never give memory back to it."""

# As pip names them, which is not always what is imported.
_PEER_PACKAGES = ("transformers", "triton", "scattermoe", "megablocks", "sonic-moe")


@dataclass(frozen=True)
class Plan:
    """What to measure: every shape with every routing in every dtype.

    Attributes:
        layer: which part of an MoE layer.
        backends: specs as ``get_backend`` takes them; empty for all that are usable.
        against: names for ``others`` of the layer's module; empty for all that are usable.
        repeats: turns that count.
    """

    shapes: tuple[Shape, ...]
    routings: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str
    backends: tuple[str, ...]
    against: tuple[str, ...]
    repeats: int
    allocator: Allocator = "default"
    layer: Layer = "experts"


_CONTENDERS = {"experts": contenders, "routed": routed}
"""Who computes a layer."""


def check(plan: Plan) -> None:
    """Refuse what cannot be measured, before measuring anything.

    Raises:
        EzpzError: as :func:`_chosen`.
    """
    for dtype, shape in product(plan.dtypes, plan.shapes):
        _chosen(plan, dtype, shape)


@dataclass(frozen=True)
class Begun:
    """What a child process measures next, and how many steps that takes."""

    what: str
    total: int


@dataclass(frozen=True)
class Ticked:
    """The step ``name`` of it begins."""

    name: str


Message = Begun | Ticked | Measured
"""A line of what a child process writes: :mod:`.worker`."""


def run(plan: Plan, progress: Progress) -> Iterator[Measured]:
    """Measure one layer after the other, in a process with the plan's allocator."""
    return (_in_child if plan.allocator == "retain" else run_here)(plan, progress)


def run_here(plan: Plan, progress: Progress) -> Iterator[Measured]:
    """Measure in this process, whatever its allocator.

    Raises:
        EzpzError: as :func:`_chosen`; or there is not enough memory for a shape.
    """
    # Cases are made one after the other, because the largest fills the memory alone.
    for dtype, shape, routing in product(plan.dtypes, plan.shapes, plan.routings):
        usable, left_out = _chosen(plan, dtype, shape)
        measured = measure_layer(plan, dtype, shape, routing, usable, progress)
        yield replace(measured, left_out=left_out)


def measure_layer(
    plan: Plan,
    dtype: str,
    shape: Shape,
    routing: str,
    usable: Sequence[Contender],
    progress: Progress,
) -> Measured:
    """Measure one layer of the plan, whoever else is in the plan.

    Raises:
        EzpzError: there is not enough memory for the shape.
    """
    is_routed = plan.layer == "routed"
    # The same counts for every dtype and allocator: only what is compared differs.
    counts = counts_of(routing, shape.E, shape.R, shape.K if is_routed else 1)
    case = _case(plan, shape, counts, dtype)
    what = f"{shape.name} {routing} {dtype} {plan.allocator}"
    with progress(what, ticks(usable, plan.repeats)) as tick:
        figures, failed = measure(usable, case, plan.repeats, tick)
    by_stock = _saved_by_stock(shape, dtype, plan.device, figures) if is_routed else None
    return Measured(
        shape=shape,
        routing=routing,
        counts=counts,
        dtype=dtype,
        device=plan.device,
        allocator=plan.allocator,
        allocator_variables=allocator_variables(),
        figures=figures,
        left_out={},
        failed=failed,
        backends=[each.name for each in usable if each.is_backend and each.name in figures],
        layer=plan.layer,
        stock_saved_bytes=by_stock,
    )


def environment(device: str) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    place = torch.device(device)
    if place.type == "cpu":
        name = f"{_cpu_name() or platform.machine()}, {os.cpu_count()} CPUs"
    else:
        # torch.cuda, torch.xpu, ...: each has this function.
        name = getattr(torch, place.type).get_device_name(place)
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": f"{device}: {name}",
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def _versions() -> Mapping[str, str]:
    found = {"ezpz_moe": __version__, "torch": torch.__version__, "torchtitan": host_name()}
    found |= {name: version(name) for name in _PEER_PACKAGES}
    found |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    # None: not installed, or torch was built without it.
    return {name: number for name, number in found.items() if number}


def _cpu_name() -> str | None:
    # Only Linux has this file; elsewhere the architecture has to do.
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(
            (line.partition(":")[2].strip() for line in lines if "model name" in line), None
        )
    return None


def _chosen(plan: Plan, dtype: str, shape: Shape) -> tuple[list[Contender], dict[str, list[str]]]:
    """Return the contenders to measure, and why the others are left out.

    Raises:
        EzpzError: a named contender is not usable, or no backend is.
    """
    of_layer = _CONTENDERS[plan.layer]
    candidates = [*of_layer.others(plan.against), *of_layer.backends(plan.backends)]
    place = torch.device(plan.device)
    why_not = {
        each.name: each.reasons_against(place, getattr(torch, dtype), shape) for each in candidates
    }
    named = {*plan.backends, *plan.against}
    for name, reasons in why_not.items():
        if reasons and name in named:
            raise EzpzError(
                f"{name} cannot be measured on {plan.device} in {dtype} with {shape.name}: "
                f"{'; '.join(reasons)}"
            )
    if not why_not.get(STOCK, ["is not among them"]):
        # These only stand in for a stock layer that cannot be measured.
        for stand_in in {PRODUCTS, COPY} - named:
            why_not.pop(stand_in, None)
    usable = [each for each in candidates if why_not.get(each.name) == []]
    if not any(each.is_backend for each in usable):
        lines = [f"{name}: {reason}" for name, why in why_not.items() for reason in why]
        raise EzpzError("\n  ".join([f"no backend can run on {plan.device} in {dtype}:", *lines]))
    return usable, {name: reasons for name, reasons in why_not.items() if reasons}


def _case(plan: Plan, shape: Shape, counts: list[int], dtype: str) -> Case | RoutedCase:
    """Make random inputs and weights of these sizes.

    Raises:
        EzpzError: they do not fit in memory.
    """
    make: Callable[..., Case | RoutedCase] = random_case
    if plan.layer == "routed":
        make = partial(random_routed_case, top_k=shape.K)
    try:
        return make(
            counts,
            dim=shape.D,
            hidden_dim=shape.F,
            dtype=getattr(torch, dtype),
            device=plan.device,
            activation=shape.activation,
            biased=shape.biased,
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise EzpzError(
            f"--shape {shape.name}: E x D x F = {shape.E} x {shape.D} x {shape.F} in {dtype} and "
            f"{shape.R} rows do not fit in the memory of {plan.device}. Choose a smaller shape."
        ) from error


def _saved_by_stock(
    shape: Shape, dtype: str, device: str, figures: Mapping[str, Figures]
) -> int | None:
    """Return what torchtitan's routed layer saves in ``dtype``, though it casts to bfloat16."""
    if dtype == "bfloat16":
        return routed.stock_saved_bytes(shape)
    if COPY in figures and not is_emulated(device, getattr(torch, dtype)):
        return figures[COPY].saved_bytes
    return None


def _in_child(plan: Plan, progress: Progress) -> Iterator[Measured]:
    """Measure in a process whose allocator retains memory; what it prints goes to our stderr."""
    command = [sys.executable, "-m", "ezpz_moe.tools.bench.worker"]
    child = subprocess.Popen(
        command,
        env=os.environ | RETAIN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        try:
            # The plan goes through stdin: it may be longer than a command line.
            child.stdin.write(TypeAdapter(Plan).dump_json(plan).decode())
            # The child reads until the end of its input.
            child.stdin.close()
            yield from _read(child.stdout, progress)
        except BaseException:  # nobody will read the rest
            child.kill()
            raise
    if child.returncode:
        raise EzpzError(
            f"measuring with --allocator {plan.allocator} ended with exit code "
            f"{child.returncode}; see the process's own output above."
        )


def _read(lines: Iterable[str], progress: Progress) -> Iterator[Measured]:
    """Yield what the child has measured; meanwhile pass its steps to ``progress``."""
    messages: TypeAdapter[Message] = TypeAdapter(Message)
    with contextlib.ExitStack() as open_progress:
        for line in lines:
            match messages.validate_json(line):
                case Begun(what, total):
                    tick = open_progress.enter_context(progress(what, total))
                case Ticked(name):
                    tick(name)
                case Measured() as measured:
                    # The bar ends before the table is printed, which would otherwise run into it.
                    open_progress.close()
                    yield measured
