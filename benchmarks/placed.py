"""What placing experts brings: rows of the busiest ranks and time of a step, before and after.

    python benchmarks/placed.py
    python benchmarks/placed.py --ranks 4 --core 0.45

Trains a small model over gloo in float32, with nothing that balances its routers, until they are
skewed; goes on with the learning rate of a late step, so that they choose as they did; places the
experts of that checkpoint; and goes on from both in turn, with the same data. The routers choose
the same experts, so that rows differ by their ranks alone. Expected is what ``ezpz-moe place`` says
of the steps before. Times are medians over the steps of all turns but each turn's first two:
compare them on a machine that does nothing else, with a core for every rank. Where there are fewer
cores, ``--core`` gives each rank a share of one that no other rank can use (:mod:`own_cores`).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import tyro
from commands import ezpz_moe, tokens_per_second
from own_cores import own_cores

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
moe_hidden_dim = 2048
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
lr = {rate}
[lr_scheduler]
warmup_steps = 2
decay_ratio = 0.0
[training]
local_batch_size = 4
seq_len = 256
mixed_precision_param = "float32"
[checkpoint]
enable = true
exclude_from_loading = ["lr_scheduler"]  # as it begins with each phase, at its own rate
[activation_checkpoint]
mode = "none"
[parallelism]
spmd_backend = "partial_dtensor"
[metrics]
log_freq = 1
[debug]
seed = 7
"""


@dataclass(frozen=True)
class Arguments:
    """Train, place the experts, and go on from both checkpoints in turn."""

    ranks: int = 2
    """Ranks, each with its part of the experts."""
    steps: int = 32
    """Until routers are skewed."""
    learning_rate: float = 1e-3
    """Of these steps."""
    late_learning_rate: float = 1e-6
    """Of all further ones."""
    window: int = 15
    """Further steps, by which experts are placed."""
    further: int = 10
    """Steps of a turn."""
    turns: int = 2
    core: float = 0.0
    """Share of a core that a rank has in these turns; 0: ranks share all cores."""


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "skewed.toml").write_text(FLAVOR)
        (folder / "early.toml").write_text(JOB.format(rate=arguments.learning_rate))
        (folder / "late.toml").write_text(JOB.format(rate=arguments.late_learning_rate))
        skewed, placed_at = arguments.steps, arguments.steps + arguments.window
        train(folder, "early", "skewed", arguments.ranks, skewed)
        resume(folder, "run", "skewed", arguments.ranks, (skewed, placed_at))
        expected = place(folder, f"checkpoint/step-{placed_at}", arguments.ranks)
        print(f"rows are expected to be {expected:.3f}", file=sys.stderr, flush=True)
        steps = (placed_at, placed_at + arguments.further)
        turns = []
        alone = own_cores(arguments.ranks, arguments.core) if arguments.core else nullcontext()
        with alone:
            for turn in range(arguments.turns):
                for kind in ("as it was", "placed"):
                    out, source = f"{kind} {turn}", "run" if kind == "as it was" else "placed"
                    speeds = resume(folder, out, source, arguments.ranks, steps)
                    print(out, f"{statistics.median(speeds[2:]):.0f}", file=sys.stderr, flush=True)
                    turns.append((kind, read(folder / out / "telemetry.jsonl"), speeds[2:]))
        report(turns, expected, arguments)


def resume(folder: Path, out: str, source: str, ranks: int, steps: tuple[int, int]) -> list[float]:
    """Go on from another run's checkpoint, between two steps, in a folder of its own."""
    checkpoints = folder / out / "checkpoint"
    checkpoints.mkdir(parents=True)
    (checkpoints / f"step-{steps[0]}").symlink_to(folder / source / f"checkpoint/step-{steps[0]}")
    return train(folder, "late", out, ranks, steps[1])


def train(folder: Path, job: str, out: str, ranks: int, steps: int) -> list[float]:
    """Train up to step ``steps``; return a rank's tokens per second, step by step."""
    flags = ["--nproc", str(ranks), "--training.steps", str(steps), "--dump_folder", out]
    flags += ["--parallelism.expert_parallel_degree", str(ranks)]
    flags += ["--checkpoint.interval", "1000000"]
    return tokens_per_second(ezpz_moe(folder, "train", f"{job}.toml", *flags))


def place(folder: Path, step: str, ranks: int) -> float:
    """Place the experts; return what rows of the busiest ranks are expected to be, as a ratio."""
    written = [f"run/{step}", f"placed/{step}"]
    how = ["--ep", str(ranks), "--json"]
    document = json.loads(ezpz_moe(folder, "place", "run", *written, *how).stdout)
    return document["rows_after"] / document["rows_before"]


def busiest(records: list[StepRecord], ranks: int) -> float:
    """Return the rows of the busiest rank, summed over the layers, per step."""
    layers = [layer for each in records for layer in each.layers]
    rows = (layer.rank_max_over_mean * sum(layer.counts_E) / ranks for layer in layers)
    return sum(rows) / len(records)


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
    display.print_table(table, title=f"{arguments.ranks} ranks, {arguments.further} steps")
    display.print_line(f"losses differ by at most {apart:.0e}; {environment('cpu')}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
