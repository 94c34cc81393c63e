"""Where a routed layer's time goes, torchtitan's and ours, by what its operations are for.

    python benchmarks/routed_profile.py
    python benchmarks/routed_profile.py --layers mixtral --dtype float32 --backends grouped_mm_fused

Prints, for each layer of ``benchmarks/routed_layer.py``, balanced, the milliseconds of forward and
backward: medians of turns, from torch's profiler, whose own cost is in them. "products" are matrix
products, "elementwise" are silu, multiplications, sums and their derivatives, "dispatch" sorts,
gathers and adds up rows, "memory" allocates, fills, casts and copies. "rest" is what no operation
of torch accounts for: Python and autograd.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from routed_layer import GOALS, shape_of
from torch.profiler import ProfilerActivity, profile

from ezpz_moe.cli import display
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.errors import exit_on_user_error
from ezpz_moe.tools.bench import routed
from ezpz_moe.tools.bench.contender import Prepared
from ezpz_moe.tools.bench.measuring import milliseconds
from ezpz_moe.tools.bench.results import COPY, STOCK
from ezpz_moe.tools.bench.routed_case import random_routed_case

KINDS = {
    "products": ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "_grouped_mm"),
    "dispatch": (
        *("sort", "argsort", "index_select", "index", "index_copy_", "gather", "scatter_add_"),
        *("index_add_", "_embedding_bag", "searchsorted", "cumsum", "histc", "bincount", "arange"),
    ),
    "memory": ("empty", "empty_strided", "fill_", "zero_", "copy_", "cat", "resize_", "clone"),
}
"""Operators of aten by what they are for; all others that compute are elementwise."""
_WHOLE = ("forward and backward", "rest")


@dataclass(frozen=True)
class Arguments:
    """Show where the time of routed layers goes."""

    layers: tuple[Literal["olmoe", "qwen3_30b", "deepseek_v2_lite", "10b_2b", "mixtral"], ...] = (
        "olmoe",
        "mixtral",
    )
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    backends: tuple[str, ...] = ("for_loop",)
    """Those with a routed layer of their own, options included: "for_loop(recompute=true)"."""
    turns: int = 9
    """That count, after one that warms up."""


def main(arguments: Arguments) -> None:
    dtype = getattr(torch, arguments.dtype)
    native = dtype == torch.bfloat16 and not is_emulated("cpu", dtype)
    names = (STOCK if native else COPY, *arguments.backends)
    contenders = [
        *routed.others(names[:1]),
        *(each for each in routed.backends(arguments.backends) if each.name in names),
    ]
    for model, scale in GOALS:
        if model not in arguments.layers:
            continue
        shape = shape_of(model, scale)
        case = random_routed_case(
            [shape.R // shape.E] * shape.E,
            top_k=shape.K,
            dim=shape.D,
            hidden_dim=shape.F,
            dtype=dtype,
        )
        ready = {each.name: each.prepare(case) for each in contenders}
        title = f"{model}/{scale} in {arguments.dtype}, {torch.get_num_threads()} threads, in ms"
        display.print_table(rows(measured(ready, case.grad_out_TD, arguments.turns)), title=title)


def measured(
    ready: dict[str, Prepared], grad_TD: torch.Tensor, turns: int
) -> dict[str, list[Counter[str]]]:
    """Return every turn of each layer; each turn begins with another layer."""
    found: dict[str, list[Counter[str]]] = {name: [] for name in ready}
    order = deque(ready)
    for turn in range(1 + turns):
        for name in order:
            spent = profiled(ready[name], grad_TD)
            if turn > 0:
                found[name].append(spent)
        order.rotate()
    return found


def profiled(prepared: Prepared, grad_TD: torch.Tensor) -> Counter[str]:
    """Return the milliseconds of one forward and backward by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        _, whole = milliseconds(prepared, grad_TD)
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        if event.key.startswith("aten::"):
            spent[kind_of(event.key.removeprefix("aten::"))] += event.self_cpu_time_total / 1e3
    spent["rest"] = whole - spent.total()
    return spent + Counter({"forward and backward": whole})


def kind_of(operator: str) -> str:
    return next((kind for kind, names in KINDS.items() if operator in names), "elementwise")


def rows(found: dict[str, list[Counter[str]]]) -> Iterator[dict[str, str]]:
    kinds = (_WHOLE[0], *KINDS, "elementwise", _WHOLE[1])
    for name, turns in found.items():
        yield {"layer": name} | {
            kind: f"{statistics.median(turn[kind] for turn in turns):.1f}" for kind in kinds
        }


if __name__ == "__main__":
    with exit_on_user_error():
        main(tyro.cli(Arguments))
