"""What a routed layer costs when some of its experts are frozen, by ``[train_only]``.

    python benchmarks/frozen.py
    python benchmarks/frozen.py --model mixtral --scale 4 --backend grouped_mm_fused

Forward and backward of one layer scaled down, balanced routing: with every expert learning; with a
tenth of them, at least one; with none, as a layer beside one that learns. Before frozen experts
were left out, all three took what the first takes. Interleaved turns, medians, and ratios within a
turn.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
import tyro

from ezpz_moe.cli import display
from ezpz_moe.compute import get_backend
from ezpz_moe.compute.reference import random_routed_case
from ezpz_moe.tools.bench.plan import environment
from ezpz_moe.tools.bench.shapes import parse_shape


@dataclass(frozen=True)
class Arguments:
    """Time a routed layer whose experts all learn, of which a tenth learns, and of which none."""

    model: str = "olmoe"
    scale: int = 4
    tokens: int = 1024
    backend: str = "for_loop"
    turns: int = 9


def main(arguments: Arguments) -> None:
    shape = parse_shape(
        arguments.model, scale=arguments.scale, tokens=arguments.scale * arguments.tokens
    )
    E, k = shape.E, shape.K
    ids = [[(token * k + choice) % E for choice in range(k)] for token in range(arguments.tokens)]
    case = random_routed_case(
        ids, num_experts=E, top_k=k, num_rows=arguments.tokens * k, dim=shape.D,
        hidden_dim=shape.F, dtype=torch.float32,
    )  # fmt: skip
    tenth_E = torch.arange(E) < max(1, round(E / 10))
    backend = get_backend(arguments.backend)

    def pass_of(trained_E: torch.Tensor | None, *, learns: bool) -> float:
        inputs = [each.detach().requires_grad_() for each in case.inputs]
        for weights in inputs[:3]:
            weights.requires_grad_(learns)
        start = time.perf_counter()
        out = case.apply(partial(backend.routed, trained_E=trained_E), *inputs)
        out.backward(case.grad_output)
        return time.perf_counter() - start

    passes = {
        "all": lambda: pass_of(None, learns=True),
        f"{int(tenth_E.sum())} of {E}": lambda: pass_of(tenth_E, learns=True),
        "none": lambda: pass_of(None, learns=False),
    }
    turns = [{name: run() for name, run in passes.items()} for _ in range(arguments.turns + 1)][1:]
    rows = [
        {
            "learn": name,
            "ms": f"{1e3 * statistics.median(turn[name] for turn in turns):.1f}",
            "speed": f"{statistics.median(turn['all'] / turn[name] for turn in turns):.2f}",
        }
        for name in passes
    ]
    title = f"{shape.name}, {arguments.tokens} tokens, {arguments.backend}, float32"
    display.print_table(rows, title=title)
    display.print_line(str(environment("cpu")))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
