"""Time the expert backends: forward and backward of one expert layer, tokens in balance.

    python benchmarks/expert_backends.py
    python benchmarks/expert_backends.py --shapes 64 1024 512 4096 --dtypes bfloat16 --repeats 11
    python benchmarks/expert_backends.py --device cuda --json cuda.json

Compared in one run, taking turns, so that a busy machine slows all of them alike:

- ``indexed``: the loop that takes ``w[e]`` under autograd. Every index writes and adds a gradient
  of the whole [E, F, D], so it is slow; it is kept here only, to measure against;
- ``dense``: one FFN over all R rows with the weights of one expert: the same FLOPs, the limit;
- ``torch._grouped_mm``: three times under autograd, as torchtitan's layer does;
- the backends that this machine can run.

Medians of ``repeats`` turns after one that is not counted. Inputs are random, never zeros. The
memory allocator is torch's and the C library's default unless a variable that is printed says
otherwise. FLOPs = 18 R D F: 6 forward, 12 backward.

Legend of the suffixes: ``ezpz_moe.compute.contract``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from rich.progress import track
from torch import Tensor

from ezpz_moe import display
from ezpz_moe.compute import backend_names, get_backend
from ezpz_moe.compute.reference import Case, random_case

Shape = tuple[int, int, int, int]
INDEXED, DENSE, GROUPED = "indexed", "dense", "torch._grouped_mm"

# (E, D, F, R) -> how many times faster than the indexed loop for_loop has to be on the CPU.
GOALS: dict[Shape, float] = {
    (8, 1024, 3584, 2048): 2,
    (36, 1024, 704, 3072): 9,
    (64, 1024, 512, 4096): 18,
}
GOAL_VERSUS_GROUPED = 1.15


@dataclass(frozen=True)
class Options:
    """Time forward and backward of one expert layer, for every backend that runs here."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    shapes: tuple[Shape, ...] = tuple(GOALS)
    """Experts E, model dimension D, expert dimension F, rows R; then the next four."""
    repeats: int = 7
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Timing:
    """The median time of one way to compute one layer."""

    dtype: str
    shape: Shape
    name: str
    milliseconds: float
    tflops: float


def indexed(w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, counts_E: Tensor):
    """The loop as one writes it first."""
    outputs, start = [], 0
    for e, count in enumerate(counts_E.tolist()):
        x_nD = x_RD[start : start + count]
        outputs.append((F.silu(x_nD @ w1_EFD[e].T) * (x_nD @ w3_EFD[e].T)) @ w2_EDF[e].T)
        start += count
    return torch.cat(outputs)


def dense(w1_1FD: Tensor, w2_1DF: Tensor, w3_1FD: Tensor, x_RD: Tensor, counts_1: Tensor):
    """One FFN over all rows."""
    w1_FD, w2_DF, w3_FD = (weight.squeeze(0) for weight in (w1_1FD, w2_1DF, w3_1FD))
    return (F.silu(x_RD @ w1_FD.T) * (x_RD @ w3_FD.T)) @ w2_DF.T


def three_grouped(w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, counts_E: Tensor):
    """The products of torchtitan's layer, in the dtype that is given."""
    offs_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)
    gate_RF = torch._grouped_mm(x_RD, w1_EFD.transpose(-2, -1), offs=offs_E)
    up_RF = torch._grouped_mm(x_RD, w3_EFD.transpose(-2, -1), offs=offs_E)
    return torch._grouped_mm(F.silu(gate_RF) * up_RF, w2_EDF.transpose(-2, -1), offs=offs_E)


def balanced(experts: int, rows: int) -> list[int]:
    """``rows`` shared out evenly; the first experts take what is left over."""
    share, rest = divmod(rows, experts)
    return [share + (expert < rest) for expert in range(experts)]


def one_pass(swiglu: Callable[..., Tensor], case: Case) -> Callable[[], object]:
    """Forward and all four gradients."""
    weights = (case.w1_EFD, case.w2_EDF, case.w3_EFD, case.x_RD)
    inputs = [tensor.requires_grad_() for tensor in weights]

    def run() -> object:
        y_RD = swiglu(*inputs, case.num_tokens_per_expert_E)
        return torch.autograd.grad(y_RD, inputs, case.grad_y_RD)

    return run


def contenders(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    """Everything that is timed for one shape, by name."""
    experts, dim, hidden_dim, rows = shape

    def case(counts: list[int]) -> Case:
        return random_case(counts, dim=dim, hidden_dim=hidden_dim, dtype=dtype, device=device)

    routed = case(balanced(experts, rows))
    usable = {
        name: get_backend(name)
        for name in backend_names()
        if not get_backend(name).why_not(torch.device(device), dtype, dims=(dim, hidden_dim))
    }
    passes = {INDEXED: one_pass(indexed, routed), DENSE: one_pass(dense, case([rows]))}
    if "grouped_mm" in usable:
        passes[GROUPED] = one_pass(three_grouped, routed)
    return passes | {name: one_pass(backend.swiglu, routed) for name, backend in usable.items()}


def milliseconds(run: Callable[[], object], device: str) -> float:
    """How long one call takes; on CUDA by the device's own clock."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def measure(shape: Shape, dtype: str, options: Options) -> list[Timing]:
    """The median times of all contenders, which take turns."""
    passes = contenders(shape, getattr(torch, dtype), options.device)
    times: dict[str, list[float]] = {name: [] for name in passes}
    turns = range(1 + options.repeats)
    what = f"{dtype} {shape}"
    for _ in track(turns, description=what, console=display.progress(), transient=True):
        for name, run in passes.items():
            times[name].append(milliseconds(run, options.device))
    _, dim, hidden_dim, rows = shape
    medians = {name: statistics.median(turns[1:]) for name, turns in times.items()}
    return [
        Timing(dtype, shape, name, median, 18 * rows * dim * hidden_dim / median / 1e9)
        for name, median in medians.items()
    ]


def rows_of(timings: list[Timing]) -> list[dict[str, str]]:
    """The printed lines of one shape: times and what they are of each other."""
    times = {timing.name: timing.milliseconds for timing in timings}
    experts, _, _, rows = timings[0].shape
    counts = balanced(experts, rows)
    return [
        {
            "dtype": timing.dtype,
            "E, D, F, R": ", ".join(map(str, timing.shape)),
            "tokens per expert": f"{min(counts)} to {max(counts)}",
            "contender": timing.name,
            "ms": f"{timing.milliseconds:.1f}",
            "TFLOP/s": f"{timing.tflops:.3g}",
            "speed / indexed": _ratio(times.get(INDEXED), timing.milliseconds),
            "time / dense": _ratio(timing.milliseconds, times.get(DENSE)),
            "time / torch's grouped": _ratio(timing.milliseconds, times.get(GROUPED)),
        }
        for timing in timings
    ]


def _ratio(above: float | None, below: float | None) -> str:
    return "-" if above is None or below is None else f"{above / below:.2f}"


def goals(timings: list[Timing]) -> list[str]:
    """What for_loop was to reach on the CPU at one shape, and what it reached."""
    times = {timing.name: timing.milliseconds for timing in timings}
    shape, dtype = timings[0].shape, timings[0].dtype
    lines = []
    if shape in GOALS:
        speedup = times[INDEXED] / times["for_loop"]
        verdict = "met" if speedup >= GOALS[shape] else "MISSED"
        lines.append(f"{speedup:.1f} x the indexed loop's speed, goal {GOALS[shape]}: {verdict}")
    if GROUPED in times:
        ratio = times["for_loop"] / times[GROUPED]
        verdict = "met" if ratio <= GOAL_VERSUS_GROUPED else "MISSED"
        lines.append(
            f"{ratio:.2f} x the time of torch._grouped_mm, goal {GOAL_VERSUS_GROUPED}: {verdict}"
        )
    return [f"for_loop {dtype} {shape}: {line}" for line in lines]


def environment(device: str) -> dict[str, object]:
    """What the figures depend on beside the code."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{os.cpu_count()} CPUs"
    allocator = {key: value for key, value in os.environ.items() if "MALLOC" in key.upper()}
    return {
        "device": f"{device}: {name}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator": allocator or "default",
    }


def main(options: Options) -> None:
    """Measure, print, and write the figures where that is asked for."""
    console = display.output()
    about = environment(options.device)
    console.print(*(f"{key}: {value}" for key, value in about.items()), sep="\n", markup=False)
    layers = product(options.dtypes, options.shapes)
    measured = [measure(shape, dtype, options) for dtype, shape in layers]
    title = f"Forward and backward, median of {options.repeats}, balanced tokens"
    display.print_table((row for timings in measured for row in rows_of(timings)), title=title)
    if options.device == "cpu":
        for timings in measured:
            console.print(*goals(timings), sep="\n", markup=False)
    if options.json:
        report = {"environment": about, "timings": [asdict(t) for ts in measured for t in ts]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
