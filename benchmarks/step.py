"""A whole training step by each backend, against the stock trainer's, on this machine.

    python benchmarks/step.py
    python benchmarks/step.py --flavor 500M_scaled --turns 20 --json step.json
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 MALLOC_TOP_PAD_=1 python benchmarks/step.py

One run of the host's own trainer (torchtitan 0.3), in which the backends take turns: each step's
experts are computed by another one, ``grouped_mm`` among them, which is the stock trainer's own
path. So all train the same weights in the same memory, and what slows the machine slows them alike;
the times of whole runs differ more from run to run than those of backends.

A step is forward, backward, clipping and optimizer, from the batch to the logged loss. The ratio is
the median of the ratios within a turn, and its interval holds the true median in 95 of 100 runs
(order statistics). docs/internals/backends.md has the table.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from ezpz_moe.cli import display
from ezpz_moe.compute import get_backend, tuning
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.installed import host_name

JOB = Path(__file__).parent.parent / "flavors" / "jobs" / "debug_cpu.toml"
STOCK = "grouped_mm"
# The embedded tokenizer's vocabulary: the full one would take most of the step.
FLAVORS = {
    "debugmodel": 'inherits = "debugmodel"',
    "500M_scaled": 'inherits = "500M"\nvocab_size = 2048\nn_layers = 4',
}
_WARM_UP = 2  # turns


@dataclass(frozen=True)
class Arguments:
    """Train with every backend in turns, and compare the time of a step."""

    flavor: Literal["debugmodel", "500M_scaled"] = "debugmodel"
    backends: tuple[str, ...] = ("for_loop", "grouped_mm_fused", "batched_mm_padded", "auto")
    """Beside the stock trainer's own path."""
    turns: int = 40
    json: Path | None = None
    """Write the time of every step to this file."""


def build_trainer(flavor: str, steps: int, folder: Path) -> Any:
    """The host's trainer for the debug job with ``flavor``, alone in this process."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    check_host()
    from torchtitan.config import ConfigManager

    (folder / "timed.toml").write_text(FLAVORS[flavor])
    job = folder / "job.toml"
    job.write_text(JOB.read_text().replace("debugmodel_sdpa_for_loop", f"timed_sdpa_{STOCK}"))
    arguments = ["--module", "ezpz_moe", "--config", str(job)]
    arguments += ["--training.steps", str(steps), "--dump-folder", str(folder / "dump")]
    arguments.append("--metrics.disable-color-printing")
    return ConfigManager().parse_args(arguments).build()


def times_in_turns(trainer: Any, backends: Sequence[str], steps: int) -> dict[str, list[float]]:
    """Seconds of every step by backend, those of the first turns left out."""
    seconds: dict[str, list[float]] = {name: [] for name in backends}
    order = deque(backends)
    waiting: list[str] = []
    selected = host().experts_class()
    (model,) = trainer.model_parts
    experts = [module for module in model.modules() if isinstance(module, selected)]
    one_step = trainer.train_step

    def timed_step(batches: Any) -> None:
        if not waiting:
            waiting.extend(order)
            order.rotate()  # each turn begins with another one
        name = waiting.pop(0)
        for each in experts:
            each._backend = None if name == STOCK else get_backend(name)
        start = time.perf_counter()
        one_step(batches)
        seconds[name].append(time.perf_counter() - start)
        tick(f"{name}, turn {len(seconds[name])}")

    trainer.train_step = timed_step
    with display.steps("Training", steps) as tick:
        trainer.train()
    trainer.close()
    return {name: each[_WARM_UP:] for name, each in seconds.items()}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the median of where they come from lies in 95 of 100."""
    reach = math.ceil(statistics.NormalDist().inv_cdf(0.975) * math.sqrt(len(values)) / 2)
    middle = len(values) / 2
    ordered = sorted(values)
    low, high = math.floor(middle) - reach, math.ceil(middle) - 1 + reach
    return ordered[max(low, 0)], ordered[min(high, len(values) - 1)]


def row(name: str, seconds: Mapping[str, Sequence[float]]) -> dict[str, str]:
    ratios = [s / own for s, own in zip(seconds[STOCK], seconds[name], strict=True)]
    low, high = median_interval(ratios)
    return {
        "backend": name,
        "s / step": f"{statistics.median(seconds[name]):.3f}",
        "speed / stock": f"{statistics.median(ratios):.3f}",
        "from": f"{low:.3f}",
        "to": f"{high:.3f}",
    }


def main(arguments: Arguments) -> None:
    contenders = (STOCK, *arguments.backends)
    steps = (_WARM_UP + arguments.turns) * len(contenders)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(arguments.flavor, steps, Path(scratch))
        seconds = times_in_turns(trainer, contenders, steps)
    title = f"{arguments.flavor}, {arguments.turns} turns, {torch.get_num_threads()} threads"
    display.print_table((row(name, seconds) for name in contenders), title=title)
    if arguments.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "versions": {"torch": torch.__version__, "torchtitan": host_name()},
            "threads": torch.get_num_threads(),
            "allocator_variables": tuning.allocator_variables(),
            "seconds": {name: [round(s, 4) for s in each] for name, each in seconds.items()},
        }
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
