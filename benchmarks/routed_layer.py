"""What a routed layer saves for backward and how fast it is, against torchtitan's and the goals.

    python benchmarks/routed_layer.py
    python benchmarks/routed_layer.py --backend batched_mm_padded --turns 9 --json figures.json

Prints a Markdown table: five models scaled down to 1024 tokens, balanced and Zipf-1 routing,
bfloat16 and float32. "saved" is the bytes saved for backward, inputs and weights left out, as a
multiple of those of torchtitan's layer; "speed" is that of forward and backward, as a multiple of
torchtitan's: the median of the ratios within a turn. In float32, and where bfloat16 is emulated, a
copy of torchtitan's forward in float32 stands in for its time. DeepSeek-V3's layer is at full size:
its bytes are counted without computing. The exit code is 1 if a goal is missed. It takes about five
minutes on two cores with bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from ezpz_moe.cli import display
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.tools.bench import routed
from ezpz_moe.tools.bench.contender import Contender
from ezpz_moe.tools.bench.plan import Plan, environment, measure_layer
from ezpz_moe.tools.bench.results import COPY, STOCK, Measured, document
from ezpz_moe.tools.bench.shapes import Shape, parse_shape


@dataclass(frozen=True)
class Goals:
    """What a layer has to reach.

    Attributes:
        saved, saved_recomputing: at most, as a multiple of stock's bytes; in bfloat16.
        speed, speed_recomputing: at least, as a multiple of stock's speed.
    """

    saved: float
    speed: float
    saved_recomputing: float = 0.03
    speed_recomputing: float = 0.85


SLOWEST = 0.97
"""No routing may be slower than this, as a multiple of stock's speed."""

TOKENS = 1024
GOALS = {  # model and scale -> goals
    ("olmoe", 4): Goals(saved=0.22, speed=1.05),
    ("qwen3_30b", 4): Goals(saved=0.22, speed=1.05),
    ("deepseek_v2_lite", 2): Goals(saved=0.30, speed=1.0),
    ("10b_2b", 2): Goals(saved=0.30, speed=1.0),
    ("mixtral", 4): Goals(saved=0.45, speed=1.0),
}
UNCOMPUTED = ("deepseek_v3", 4096, Goals(saved=0.15, speed=1.0))
"""A model, its tokens, and its goals, of which only those of memory are judged."""

COLUMNS = ("layer", "saved", "saved, recompute", "speed", "speed, recompute")


def shape_of(model: str, scale: int) -> Shape:
    return parse_shape(model, scale=scale, tokens=scale * TOKENS)


def contenders(backend: str, stock: str) -> list[Contender]:
    """Return stock, the backend's own layer, and the one that computes gate and up again.

    Raises:
        EzpzError: there is no such backend, or it has no routed layer of its own.
    """
    if backend not in [each.name for each in routed.backends([backend])]:
        raise EzpzError(f"--backend {backend}: has no routed layer of its own. Try for_loop.")
    specs = (backend, f"{backend}(recompute=true)")
    ours = [each for each in routed.backends(specs) if each.name in specs]
    return [*routed.others([stock]), *ours]


def judged(figure: float | None, limit: float, *, at_least: bool, floor: float = 0.0) -> str:
    """Return the figure beside its goal, with "met" or "MISSED"."""
    if figure is None:
        return "-"
    met = figure >= limit if at_least else figure <= limit
    verdict = "met" if met else "MISSED"
    if figure < floor:
        verdict += f", below {floor:g}"
    return f"{figure:.3f} ({'>=' if at_least else '<='} {limit:g}): {verdict}"


def row(measured: Measured, backend: str, goals: Goals) -> dict[str, str]:
    """Return a line of the table."""
    recomputing = f"{backend}(recompute=true)"
    saved, saved_again = (
        measured.saved_ratio(name) if name in measured.figures else None
        for name in (backend, recomputing)
    )
    speed, speed_again = (
        measured.time_ratio(measured.stock, name) for name in (backend, recomputing)
    )
    # The goals of memory are those of bfloat16: the same layer in float32 is given without.
    in_goal = measured.dtype == "bfloat16"
    return {
        "layer": f"{measured.shape.name} {measured.routing} {measured.dtype}",
        "saved": _saved(saved, goals.saved, in_goal),
        "saved, recompute": _saved(saved_again, goals.saved_recomputing, in_goal),
        "speed": judged(speed, goals.speed, at_least=True, floor=SLOWEST),
        "speed, recompute": judged(speed_again, goals.speed_recomputing, at_least=True),
    }


def _saved(ratio: float | None, limit: float, in_goal: bool) -> str:
    if ratio is None or in_goal:
        return judged(ratio, limit, at_least=False)
    return f"{ratio:.3f}"


def uncomputed_row(ours: list[Contender]) -> dict[str, str]:
    """Return the line of the layer that is counted without computing it."""
    model, tokens, goals = UNCOMPUTED
    shape = parse_shape(model, scale=1, tokens=tokens)
    stock = routed.stock_saved_bytes(shape)
    saved, saved_again = (
        routed.saved_without_computing(each.prepare, shape, torch.bfloat16) for each in ours
    )
    return {
        "layer": f"{model} bfloat16, not computed",
        "saved": judged(saved / stock if stock else None, goals.saved, at_least=False),
        "saved, recompute": judged(
            saved_again / stock if stock else None, goals.saved_recomputing, at_least=False
        ),
        "speed": "-",
        "speed, recompute": "-",
    }


def measurements(backend: str, turns: int) -> Iterator[tuple[Measured, Goals]]:
    """Measure one layer after the other."""
    for dtype, ((model, scale), goals) in product(("bfloat16", "float32"), GOALS.items()):
        native = dtype == "bfloat16" and not is_emulated("cpu", torch.bfloat16)
        stock = STOCK if native else COPY
        shape = shape_of(model, scale)
        for routing in ("balanced", "zipf1"):
            plan = Plan(
                shapes=(shape,),
                routings=(routing,),
                dtypes=(dtype,),
                device="cpu",
                backends=(),
                against=(stock,),
                repeats=turns,
                layer="routed",
            )
            them = contenders(backend, stock)
            yield measure_layer(plan, dtype, shape, routing, them, display.steps), goals


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="for_loop", help="one with a routed layer of its own")
    parser.add_argument("--turns", type=int, default=5, help="that count, for each layer")
    parser.add_argument("--json", type=Path, help="write every turn to this file")
    options = parser.parse_args()
    with exit_on_user_error():
        _, *ours = contenders(options.backend, COPY)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        lines, results = [], []
        for measured, goals in measurements(options.backend, options.turns):
            results.append(measured)
            lines.append(row(measured, options.backend, goals))
            # At once: whoever stops this has what was measured.
            _print(lines[-1])
            for name, reason in measured.failed.items():
                print(f"FAILED: {name}: {reason}", file=sys.stderr)
        lines.append(uncomputed_row(ours))
        _print(lines[-1])
    if options.json:
        command = shlex.join(["python", "benchmarks/routed_layer.py", *sys.argv[1:]])
        found = document(results, environment("cpu"), command)
        options.json.write_text(f"{json.dumps(found, indent=1)}\n")
    failed = any(measured.failed for measured in results)
    return int(failed or any("MISSED" in each for line in lines for each in line.values()))


def _print(line: dict[str, str]) -> None:
    print(f"| {' | '.join(line[column] for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
