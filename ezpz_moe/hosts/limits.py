"""Values that are of the right kind and that nothing can run. The same for all hosts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ezpz_moe.errors import did_you_mean

_IDS = 2 * 8  # bytes of a token: its id and its label
_ACTIVATION = 2  # bytes: bfloat16
_TEBIBYTE = 2**40
_MOST = 16 * _TEBIBYTE
"""Bytes: no rank has as many."""


def memory_problems(setting: str, value: int, tokens: int, dim: int) -> Iterator[str]:
    """Yield why no machine has room for what a rank computes at once.

    Args:
        setting: path of the setting that decides it.
        value: what it is set to.
        tokens: so many a rank computes at once.
        dim: the model's.
    """
    needed = least_bytes(tokens, dim, layers=1)
    if needed > _MOST:
        yield (
            f"{setting} = {value}: {tokens:,} tokens at once would take "
            f"{needed / _TEBIBYTE:,.0f} TiB on each rank for their ids and one layer's input "
            "alone. Choose fewer."
        )


def least_bytes(tokens: int, dim: int, layers: int) -> int:
    """Return what a rank holds of a batch at the least: ids, labels, and every layer's input.

    Full activation checkpointing keeps that much, and everything else more.
    """
    return tokens * (_IDS + _ACTIVATION * dim * layers)


def degree_problems(degree: int, experts: Mapping[str, int], flavor: str) -> Iterator[str]:
    """Yield why ranks cannot share a model's experts.

    Args:
        degree: of expert parallelism; all layers share it.
        experts: how many experts each layer has, by the layer's number; of one alone it is unsaid.
        flavor: the model's.
    """
    undivided = [layer for layer, number in experts.items() if number % degree]
    if not undivided:
        return
    # It has to divide what divides the experts of each.
    common = math.gcd(*experts.values())
    divisors = [d for d in range(1, common + 1) if common % d == 0]
    nearest = [max(d for d in divisors if d < degree), *[d for d in divisors if d > degree][:1]]
    first, *more = undivided
    where = f" in layer {first}" if len(set(experts.values())) > 1 else ""
    where += f" and those of {len(more)} more" if where and more else ""
    yield (
        f"parallelism.expert_parallel_degree = {degree} does not divide the "
        f"{experts[first]} experts of flavor {flavor!r}{where}. The "
        f"nearest that do: {' and '.join(map(str, nearest))}."
    )


def learning_rate_problems(steps: int, total_steps: int | None) -> Iterator[str]:
    """Yield why a run cannot go on after its schedule's end.

    Args:
        steps: of the run.
        total_steps: of the schedule of the learning rate; None: the run's.
    """
    if total_steps is not None and total_steps < steps:
        yield (
            f"lr_scheduler.total_steps = {total_steps} is less than training.steps = {steps}: "
            f"after step {total_steps + 1} the trainer's learning rate would turn negative or rise "
            "again, and without a decay the run would fail. Leave total_steps out, or set it to at "
            f"least {steps}."
        )


def compile_problems(backend: str) -> Iterator[str]:
    """Yield why torch.compile has no such backend. It asks torch only about an unusual one."""
    if backend == "inductor":
        return
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        yield (
            f"compile.backend = {backend!r}: torch.compile has no such backend."
            f"{did_you_mean(backend, known)} It has "
            f"{', '.join(torch.compiler.list_backends())}, and others for debugging."
        )
