"""A whole training step by each backend, against the stock trainer's, on this machine.

    python benchmarks/step.py
    python benchmarks/step.py --only debugmodel --steps 20 --turns 5 --json step.json

Every run is ``ezpz-moe train`` with the host's own trainer, and runs take turns. A run counts as
the median of its steps but the first two, by the tokens per second that the trainer logs; the ratio
is the median of the ratios within a turn. ``grouped_mm`` is the stock trainer's own expert path.
docs/backends.md has the table.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import tyro

from ezpz_moe import display
from ezpz_moe.hosts.installed import host_name

JOB = Path(__file__).parent.parent / "flavors" / "jobs" / "debug_cpu.toml"
STOCK = "grouped_mm"
# The embedded tokenizer's vocabulary: the full one would take most of the step.
FLAVORS = {
    "debugmodel": 'inherits = "debugmodel"',
    "500M_scaled": 'inherits = "500M"\nvocab_size = 2048\nn_layers = 4',
}
_WARM_UP = 2  # steps


@dataclass(frozen=True)
class Arguments:
    """Train with every backend in turns, and compare the time of a step."""

    only: tuple[Literal["debugmodel", "500M_scaled"], ...] = ("debugmodel", "500M_scaled")
    """Of the flavors."""
    backends: tuple[str, ...] = ("for_loop", "grouped_mm_fused", "batched_mm_padded", "auto")
    """Beside the stock trainer's own path."""
    steps: int = 12
    turns: int = 5
    json: Path | None = None
    """Write every run's figure to this file."""


def tokens_per_second(flavor: str, backend: str, steps: int, folder: Path) -> float:
    """Of a run of ``steps`` steps, the median."""
    (folder / "timed.toml").write_text(FLAVORS[flavor])
    job = JOB.read_text().replace("debugmodel_sdpa_for_loop", f"timed_sdpa_{backend}")
    (folder / "job.toml").write_text(job)
    command = [sys.executable, "-m", "ezpz_moe.cli", "train", str(folder / "job.toml")]
    flags = ["--training.steps", str(steps), "--dump-folder", str(folder / "dump")]
    flags += ["--metrics.disable-color-printing"]
    run = subprocess.run([*command, *flags], check=False, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{flavor} with {backend}:\n{run.stdout}{run.stderr}")
    logged = re.findall(r"tps: ([\d,]+)", run.stdout + run.stderr)
    return statistics.median(float(each.replace(",", "")) for each in logged[_WARM_UP:])


def main(arguments: Arguments) -> None:
    contenders = (STOCK, *arguments.backends)
    runs = {(f, b): list[float]() for f in arguments.only for b in contenders}
    total = len(runs) * arguments.turns
    with tempfile.TemporaryDirectory() as scratch, display.steps("Training", total) as tick:
        for turn in range(arguments.turns):
            for flavor, backend in sorted(runs, reverse=bool(turn % 2)):
                tick(f"{flavor} {backend}, turn {turn + 1}")
                speed = tokens_per_second(flavor, backend, arguments.steps, Path(scratch))
                runs[flavor, backend].append(speed)
    for flavor in arguments.only:
        stock = runs[flavor, STOCK]
        display.print_table(
            (
                {
                    "backend": backend,
                    "tokens / s": f"{statistics.median(runs[flavor, backend]):.0f}",
                    "speed / stock": f"{statistics.median(ratios):.3f}",
                    "from": f"{min(ratios):.3f}",
                    "to": f"{max(ratios):.3f}",
                }
                for backend in contenders
                for ratios in [[a / b for a, b in zip(runs[flavor, backend], stock, strict=True)]]
            ),
            title=f"{flavor}, {arguments.steps} steps, {torch.get_num_threads()} threads",
        )
    if arguments.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "versions": {"torch": torch.__version__, "torchtitan": host_name()},
            "threads": torch.get_num_threads(),
            "tokens_per_second": {f"{f} {b}": speeds for (f, b), speeds in runs.items()},
        }
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
