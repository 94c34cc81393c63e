"""What placing experts brings: rows of the busiest ranks and time of a step, before and after.

    python benchmarks/placed.py
    python benchmarks/placed.py --ranks 4 --steps 100

Trains a small model over gloo in float32, with nothing that balances its routers; places the
experts of its checkpoint; and goes on from both checkpoints in turn, with the same data. The
routers choose the same experts, so that rows differ by their ranks alone. Expected is what
``ezpz-moe place`` says of the steps before. The learning rate is that of a late step, so that
routers still choose as they did: frequent tokens have their experts from the start. Times are
medians over the steps of all turns but each turn's first two: compare them on a machine that does
nothing else, with a core for every rank.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from ezpz_moe.cli import display
from ezpz_moe.telemetry.json_lines import read
from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.tools.bench.plan import environment

FLAVOR = """
inherits = "debugmodel"
attention = "sdpa"
compute_backend = "for_loop"
n_layers = 4
n_heads = 4
num_experts = 16
router_top_k = 2
moe_hidden_dim = 1024
num_shared_experts = 0
[balance]
bias_update = "none"
[telemetry]
every = 1
"""
JOB = """
[model]
name = "ezpz_moe"
flavor = "skewed"
[optimizer]
lr = 2e-5
[lr_scheduler]
warmup_steps = 2
decay_ratio = 0.0
[training]
local_batch_size = 2
seq_len = 256
mixed_precision_param = "float32"
[checkpoint]
enable = true
[activation_checkpoint]
mode = "none"
[parallelism]
spmd_backend = "partial_dtensor"
[metrics]
log_freq = 1
[debug]
seed = 7
"""
_TPS = re.compile(r"tps: *([\d,]+)")


@dataclass(frozen=True)
class Arguments:
    """Train, place the experts, and go on from both checkpoints in turn."""

    ranks: int = 2
    """Ranks, each with its part of the experts."""
    steps: int = 20
    """Before the experts are placed."""
    window: int = 20
    """Of these steps, how many of the last ones are looked at."""
    further: int = 10
    """Steps of a turn."""
    turns: int = 3


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "skewed.toml").write_text(FLAVOR)
        (folder / "job.toml").write_text(JOB)
        saved, last = arguments.steps, arguments.steps + arguments.further
        train(folder, "run", arguments.ranks, saved, last)
        step = f"checkpoint/step-{saved}"
        expected = place(folder, step, arguments)
        turns = []
        for turn in range(arguments.turns):
            for kind in ("as it was", "placed"):
                out = f"{kind} {turn}"
                (folder / out / "checkpoint").mkdir(parents=True)
                source = folder / ("run" if kind == "as it was" else "placed") / step
                (folder / out / step).symlink_to(source)
                speeds = train(folder, out, arguments.ranks, last, last)
                turns.append((kind, read(folder / out / "telemetry.jsonl"), speeds[2:]))
        report(turns, expected, arguments)


def train(folder: Path, out: str, ranks: int, steps: int, last: int) -> list[float]:
    """Train up to step ``steps`` of ``last``; return a rank's tokens per second, step by step."""
    flags = ["--nproc", str(ranks), "--training.steps", str(steps), "--dump_folder", out]
    flags += ["--parallelism.expert_parallel_degree", str(ranks)]
    flags += ["--checkpoint.interval", "1000000", "--lr_scheduler.total_steps", str(last)]
    done = ezpz_moe(folder, "train", "job.toml", *flags)
    return tokens_per_second(done.stdout + done.stderr)


def place(folder: Path, step: str, arguments: Arguments) -> float:
    """Place the experts; return what rows of the busiest ranks are expected to be, as a ratio."""
    written = [f"run/{step}", f"placed/{step}"]
    how = ["--ep", str(arguments.ranks), "--last", str(arguments.window), "--json"]
    document = json.loads(ezpz_moe(folder, "place", "run", *written, *how).stdout)
    return document["rows_after"] / document["rows_before"]


def ezpz_moe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command; return what it prints."""
    command = [sys.executable, "-m", "ezpz_moe.cli", *arguments]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done


def busiest(records: list[StepRecord], ranks: int) -> float:
    """Return the rows of the busiest rank, summed over the layers, per step."""
    layers = [layer for each in records for layer in each.layers]
    rows = (layer.rank_max_over_mean * sum(layer.counts_E) / ranks for layer in layers)
    return sum(rows) / len(records)


def tokens_per_second(printed: str) -> list[float]:
    """Return what the trainer says of every step, as its first rank sees it."""
    return [float(found.replace(",", "")) for found in _TPS.findall(printed)]


def report(
    turns: list[tuple[str, list[StepRecord], list[float]]], expected: float, arguments: Arguments
) -> None:
    rows, speeds, losses = {}, {}, {}
    for kind, records, of_steps in turns:
        rows.setdefault(kind, []).append(busiest(records, arguments.ranks))
        speeds.setdefault(kind, []).extend(of_steps)
        losses[kind] = [each.loss for each in records]
    apart = max(abs(a - b) / a for a, b in zip(losses["as it was"], losses["placed"], strict=True))
    was = statistics.median(speeds["as it was"])
    table = [
        {
            "experts": kind,
            "rows of the busiest ranks": f"{statistics.mean(rows[kind]):,.0f}",
            "ratio": f"{statistics.mean(rows[kind]) / statistics.mean(rows['as it was']):.3f}",
            "expected": f"{1 if kind == 'as it was' else expected:.3f}",
            "tokens/s/rank": f"{statistics.median(speeds[kind]):.0f}",
            "step": f"{was / statistics.median(speeds[kind]):.3f}",
        }
        for kind in rows
    ]
    display.print_table(
        table, title=f"{arguments.ranks} ranks, {arguments.further} steps from {arguments.steps} on"
    )
    display.print_line(f"losses differ by at most {apart:.0e}; {environment('cpu')}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
