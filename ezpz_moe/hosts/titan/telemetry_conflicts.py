"""Find what a flavor's ``[telemetry]`` cannot be combined with in the job."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any

from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.hosts.reliance import broken
from ezpz_moe.hosts.titan.relied_on_in_part import PICTURES


def telemetry_problems(config: Any, flavor: str) -> Iterator[str]:
    """Yield messages, each with the flavor's key and what excludes it.

    Args:
        config: the host's, of the whole job.
        flavor: its name.
    """
    settings: Telemetry | None = getattr(config.metrics, "telemetry", None)
    if settings is not None:
        for check in (_cadences, _pictures, _cuda_graphs):
            for problem in check(config, settings):
                yield f"flavor {flavor!r}: [telemetry] {problem}"


def _cadences(config: Any, settings: Telemetry) -> Iterator[str]:
    log_freq = config.metrics.log_freq
    for key, every in settings.cadences.items():
        # `trainer_config` has chosen a divisor, but the job or a flag may have set another.
        if every % log_freq:
            yield (
                f"{key} = {every} must be a multiple of metrics.log_freq = {log_freq}: the routers "
                f"report when the host logs. Set metrics.log_freq to {gcd(every, log_freq)}, or "
                f"{key} to a multiple of {log_freq}."
            )


def _pictures(config: Any, settings: Telemetry) -> Iterator[str]:
    metrics = config.metrics
    # Pictures need private attributes of the host's loggers, and only if loggers are enabled.
    if settings.images and (metrics.enable_wandb or metrics.enable_tensorboard):
        for line, reason in broken(PICTURES).items():
            yield (
                f"images = true needs {line.thing}, but {reason}. Set images = false; "
                "telemetry.jsonl and `ezpz-moe plot` show the same."
            )


def _cuda_graphs(config: Any, settings: Telemetry) -> Iterator[str]:
    if settings.dumped and not config.training.disable_cuda_graphs:
        yield (
            "dump copies the routing to the host, which a CUDA graph cannot capture. Leave "
            "training.disable_cuda_graphs out, or set it to true."
        )
