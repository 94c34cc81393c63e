"""Whether a plan puts cuts in the order in which they are fast: predicted steps beside measured.

    python benchmarks/planned_cuts.py --ranks 2
    python benchmarks/planned_cuts.py --ranks 4 --cuts 14

Calibrates this machine for a small model with balanced experts, plans all cuts of it, and trains
with some of them, evenly spread over the predicted order: real runs over gloo, in turns, each of a
few steps of which the first two do not count. Prints both times of each cut, and Kendall's tau over
the pairs whose measured medians differ by more than 5 %. Wants a machine that does nothing else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import tyro
from commands import ezpz_moe, tokens_per_second

from ezpz_moe.cli import display
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.tools.bench.plan import environment
from ezpz_moe.tools.planning.machine import machine
from ezpz_moe.tools.planning.plans import Row, plan
from ezpz_moe.tools.planning.written import write_job

FLAVOR = """
inherits = "debugmodel"
attention = "sdpa"
compute_backend = "for_loop"
n_layers = 4
n_heads = 4
num_experts = 8
router_top_k = 2
moe_hidden_dim = 512
num_shared_experts = 0
[router]
routing = "balanced"
"""
JOB = """
[model]
name = "ezpz_moe"
flavor = "cuts"
[training]
local_batch_size = 4
global_batch_size = 8
seq_len = 128
mixed_precision_param = "float32"
[activation_checkpoint]
mode = "none"
[parallelism]
pipeline_parallel_schedule = "1F1B"
[metrics]
log_freq = 1
[debug]
seed = 7
"""
_ALIKE = 0.05
_SEQUENCE = 128
"""Tokens, as the job says."""


@dataclass(frozen=True)
class Arguments:
    """Predict and measure steps of some cuts."""

    ranks: int = 2
    cuts: int = 14
    steps: int = 5
    """Of each run."""
    turns: int = 2
    machine: str | None = None
    """A file of this machine. Default: it is calibrated first."""


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cuts.toml").write_text(FLAVOR)
        (folder / "job.toml").write_text(JOB)
        chosen = spread(_rows(folder, arguments), arguments.cuts)
        for number, row in enumerate(chosen):
            write_job(folder / f"{number}.toml", find_job(str(folder / "job.toml")), [], row.cut)
        seconds: list[list[float]] = [[] for _ in chosen]
        for turn in range(arguments.turns):
            # Another order each time: what a machine does besides then slows others.
            for number in sorted(range(len(chosen)), reverse=bool(turn % 2)):
                seconds[number] += _measured(folder, number, chosen[number], arguments)
                print(chosen[number].cut, f"{seconds[number][-1]:.3f}", file=sys.stderr, flush=True)
        report(chosen, [statistics.median(each) for each in seconds], arguments)


def _rows(folder: Path, arguments: Arguments) -> Sequence[Row]:
    job, file = str(folder / "job.toml"), arguments.machine or str(folder / "machine.toml")
    if arguments.machine is None:
        ezpz_moe(folder, "plan", "job.toml", "--nproc", str(arguments.ranks), "--calibrate", file)
    found = plan(
        job,
        [],
        world_size=arguments.ranks,
        ranks_per_node=None,
        on=machine(file),
        load="balanced",
    )
    # On a CPU torchtitan needs distributed tensors for the others, with which ours cannot balance
    # experts under tensor parallelism.
    return [row for row in found.rows if row.cut.tp == 1 or row.cut.ep == row.cut.pp == 1]


def spread(rows: Sequence[Row], number: int) -> list[Row]:
    """Return so many rows evenly over their order, the first and the last among them."""
    last = len(rows) - 1
    return [rows[round(last * each / (number - 1))] for each in range(number)]


def _measured(folder: Path, number: int, row: Row, arguments: Arguments) -> list[float]:
    """Train with a cut; return seconds of its steps but the first two."""
    flags = ["--nproc", str(arguments.ranks), "--training.steps", str(arguments.steps)]
    done = ezpz_moe(folder, "train", f"{number}.toml", *flags, "--dump_folder", f"out{number}")
    cut = row.cut
    tokens = cut.microbatch * cut.microbatches * cut.data_ranks * _SEQUENCE
    speeds = tokens_per_second(done)
    counted = speeds[2 * len(speeds) // arguments.steps :]
    return [tokens / speed / arguments.ranks for speed in counted]


def kendall(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, int]:
    """Return Kendall's tau over pairs that measurably differ, and how many those are."""
    signs = [
        1 if (predicted[a] - predicted[b]) * (measured[a] - measured[b]) > 0 else -1
        for a, b in combinations(range(len(measured)), 2)
        if abs(measured[a] - measured[b]) > _ALIKE * min(measured[a], measured[b])
    ]
    return sum(signs) / len(signs), len(signs)


def report(chosen: Sequence[Row], measured: Sequence[float], arguments: Arguments) -> None:
    predicted = [row.time.predicted for row in chosen]
    table = [
        {
            "cut": str(row.cut),
            "predicted": f"{1e3 * row.time.predicted:.0f} ms",
            "measured": f"{1e3 * took:.0f} ms",
            "ratio": f"{row.time.predicted / took:.2f}",
            "limited by": row.time.limited_by,
        }
        for row, took in zip(chosen, measured, strict=True)
    ]
    display.print_table(table, title=f"{arguments.ranks} ranks")
    tau, pairs = kendall(predicted, measured)
    display.print_line(
        f"Kendall's tau {tau:.2f} over {pairs} pairs; the best predicted takes "
        f"{measured[predicted.index(min(predicted))] / min(measured):.3f} times the best measured; "
        f"{environment('cpu')}"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
