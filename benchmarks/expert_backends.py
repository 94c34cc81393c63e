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

Times are medians of the turns, ratios are medians of the ratios within a turn. Inputs are random,
never zeros. The memory allocator is torch's and the C library's default unless a variable that is
printed says otherwise. FLOPs = 18 R D F: 6 forward, 12 backward.

Legend of the suffixes: ``ezpz_moe.compute.contract``.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
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
LIMIT = 1.15  # times the time of torch._grouped_mm


@dataclass(frozen=True)
class Options:
    """Time forward and backward of one expert layer, for every backend that runs here."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    shapes: tuple[Shape, ...] = tuple(GOALS)
    """Experts E, model dimension D, expert dimension F, rows R; then the next four."""
    repeats: int = 5
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Measured:
    """The milliseconds of every turn at one layer, by contender."""

    dtype: str
    shape: Shape
    turns: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.turns[name])

    def ratio(self, above: str, below: str) -> float | None:
        """Median of the ratios within each turn, where the machine was equally busy for both."""
        if not {above, below} <= self.turns.keys():
            return None
        pairs = zip(self.turns[above], self.turns[below], strict=True)
        return statistics.median(a / b for a, b in pairs)


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


def measure(shape: Shape, dtype: str, options: Options) -> Measured:
    """Time all contenders. They take turns, and each turn begins with another one."""
    passes = contenders(shape, getattr(torch, dtype), options.device)
    turns: dict[str, list[float]] = {name: [] for name in passes}
    order = deque(passes)
    counted = track(
        range(1 + options.repeats),
        description=f"{dtype} {shape}",
        console=display.progress(),
        transient=True,
    )
    for turn in counted:
        for name in order:
            elapsed = milliseconds(passes[name], options.device)
            if turn > 0:  # the first turn warms up
                turns[name].append(elapsed)
        order.rotate()
    return Measured(dtype, shape, turns)


def print_measured(measured: Measured) -> None:
    """One table for each layer: times, and what they are of each other."""
    experts, dim, hidden_dim, rows = measured.shape
    counts = balanced(experts, rows)
    flops = 18 * rows * dim * hidden_dim
    lines = [
        {
            "contender": name,
            "ms": f"{measured.median(name):.4g}",
            "TFLOP/s": f"{flops / measured.median(name) / 1e9:.3g}",
            "speed / indexed": display.number(measured.ratio(INDEXED, name), ".2f"),
            "time / dense": display.number(measured.ratio(name, DENSE), ".2f"),
            "time / torch's grouped": display.number(measured.ratio(name, GROUPED), ".2f"),
        }
        for name in measured.turns
    ]
    tokens = f"{min(counts)} to {max(counts)} tokens per expert"
    title = f"{measured.dtype}, (E, D, F, R) = {measured.shape}, {tokens}"
    display.print_table(lines, title=title)


def goals(measured: Measured) -> Iterator[str]:
    """What for_loop was to reach on the CPU at one layer, and what it reached."""
    what = f"for_loop {measured.dtype} {measured.shape}"
    speedup, goal = measured.ratio(INDEXED, "for_loop"), GOALS.get(measured.shape)
    if speedup is not None and goal is not None:
        verdict = "met" if speedup >= goal else "MISSED"
        yield f"{what}: {speedup:.1f} x the speed of the indexed loop, goal {goal}: {verdict}"
    time_ratio = measured.ratio("for_loop", GROUPED)
    if time_ratio is not None:
        verdict = "met" if time_ratio <= LIMIT else "MISSED"
        yield f"{what}: {time_ratio:.2f} x the time of torch._grouped_mm, limit {LIMIT}: {verdict}"


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
    results = []
    for dtype, shape in product(options.dtypes, options.shapes):
        results.append(measure(shape, dtype, options))
        print_measured(results[-1])
        if options.device == "cpu":
            for line in goals(results[-1]):
                console.print(line, markup=False)
    if options.json:
        report = {"environment": about, "measured": list(map(asdict, results))}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
