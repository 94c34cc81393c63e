"""Telemetry of a long run: the size of its file, and time and memory of writing and drawing it.

    python benchmarks/telemetry_scale.py
    python benchmarks/telemetry_scale.py --steps 100000 --every 100 --appended

The first has files of a few sizes, the last one as large as a file becomes, with one more record
and a compaction for each; ``--appended`` writes every record as a run does, and compacts whenever
the file is full. Made-up records of 61 layers of 256 experts, as a run with expert parallelism
writes them, with pairs: in one of ten steps, in the middle of the run, some experts of a layer
starve, and so alerts are raised. Each size is written and drawn in processes of their own, whose
largest memory is the system's figure; its compaction is drawn too, for its alerts. Experts are then
placed by its last steps, on 64 ranks in nodes of eight, by load and by pairs. Times are of the
processor: what else the machine does is not in them, nor is waiting for the disk. No part of a
record is of one rank, so their number changes nothing but the sums.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from ezpz_moe.cli import display
from ezpz_moe.telemetry.compaction import compact
from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.telemetry.lines import spelled
from ezpz_moe.telemetry.record import LayerRecord, StepRecord

COMPACTED = "compacted"


@dataclass(frozen=True)
class Arguments:
    """Runs of these ``steps``, with a record for ``every`` so many.

    Attributes:
        ranks: of the run, each with ``tokens`` in a step.
    """

    steps: tuple[int, ...] = (1000, 2500, 6000)
    every: int = 10
    appended: bool = False
    layers: int = 61
    experts: int = 256
    top_k: int = 8
    pairs: int = 64
    ranks: int = 4096
    tokens: int = 4096
    only: str = ""
    """What a process of its own does, in the folder of this name: nobody else sets it."""


def record(
    arguments: Arguments, step: int, random: np.random.Generator, starving: int = -1
) -> StepRecord:
    """Return the record that ends with ``step``; in layer ``starving`` experts get nothing."""
    tokens = arguments.ranks * arguments.tokens * arguments.every
    return StepRecord(
        step=step,
        steps=arguments.every,
        loss=2 + 8 * np.exp(-step / 1e4) + 0.01 * random.normal(),
        grad_norm=1.0,
        backend="grouped_mm",
        layers=tuple(
            layer(arguments, number, tokens, random, is_starving=number == starving)
            for number in range(arguments.layers)
        ),
        warmup_steps=200,
    )


def layer(
    arguments: Arguments,
    number: int,
    tokens: int,
    random: np.random.Generator,
    *,
    is_starving: bool,
) -> LayerRecord:
    E, rows = arguments.experts, tokens * arguments.top_k
    share_E = random.gamma(4, size=E)
    if is_starving:
        share_E[: E // 8] = 0
    p_E = share_E / share_E.sum()
    top = random.integers(0, E - 1, size=(arguments.pairs, 2))
    return LayerRecord(
        layer=number,
        tokens=tokens,
        counts_E=tuple((p_E * rows).astype(int).tolist()),
        zero_counts_Z=(),
        top1_probability=random.random(),
        margin=random.random(),
        bias_norm=random.random(),
        losses={
            "aux_loss": random.random(),
            "mse_loss": random.random(),
            "z_loss": random.random(),
        },
        scaled_losses={"aux_loss": random.random(), "mse_loss": 0.0, "z_loss": 0.0},
        padding_waste=None,
        drop_rate=0.0,
        rank_max_over_mean=1 + random.random(),
        probabilities_E=tuple(float(f"{p:.4g}") for p in p_E),
        rows_dispatched=rows,
        rows_off_rank=rows // 2,
        rows_off_node=rows // 4,
        pairs=tuple((int(a), int(a) + 1 + int(b) % (E - 1 - int(a)), 9) for a, b in top),
        sampled_tokens=tokens // arguments.every,
    )


def write(arguments: Arguments, folder: Path, steps: int) -> None:
    """Write a run's file; print how long a record took, and a compaction."""
    path, random = folder / "telemetry.jsonl", np.random.default_rng(0)
    # Few records are made, because making one takes longer than writing it.
    usual, starving = (
        [record(arguments, 1, random, layer) for _ in range(10)] for layer in (-1, 1)
    )
    of_run = [
        replace((starving if 5 <= 10 * step // steps < 6 else usual)[number % 10], step=step)
        for number, step in enumerate(range(arguments.every, steps + 1, arguments.every))
    ]
    if arguments.appended:
        took = [seconds(partial(append, path, one)) for one in of_run]
        print(statistics.median(took), max(took))
        return
    lines = {id(one.layers): spelled(one).partition(b', "steps"') for one in (*usual, *starving)}
    with path.open("wb") as file:
        for one in of_run[:-1]:
            file.write(b'{"format": 1, "step": %d' % one.step)
            file.writelines(lines[id(one.layers)][1:])
    took_one = seconds(partial(append, path, of_run[-1], 2**60))
    # A copy, so that what is drawn is as large as it says.
    copy = folder / COMPACTED / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    print(took_one, seconds(partial(compact, copy)))


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def draw(folder: Path) -> None:
    """Draw a run; print how long it took."""
    from ezpz_moe.telemetry.plot import plot

    start = time.process_time()
    plotted = plot(folder)
    print(time.process_time() - start, len(plotted.alerts))


def place_experts(folder: Path) -> None:
    """Find an order of every layer's experts; print how long it took."""
    from ezpz_moe.tools.placement.report import Aim, place
    from ezpz_moe.tools.placement.window import read_window

    start = time.process_time()
    window = read_window(folder, 1000)
    groups = {layer.number: 1 for layer in window.layers}
    placed = place(window, groups, Aim(64, 8, "both", 0.01))
    print(time.process_time() - start, len(placed.layers))


def measured(
    arguments: Arguments, only: str, folder: Path, steps: int
) -> tuple[list[float], float]:
    """Return what a process of its own prints, and its largest memory in GB."""
    same = [
        f"--{name}={getattr(arguments, name)}" for name in ("every", "layers", "experts", "ranks")
    ]
    same += ["--appended"] * arguments.appended
    own = [sys.executable, __file__, "--steps", str(steps), *same, f"--only={only}:{folder}"]
    printed = subprocess.run(own, check=True, capture_output=True, text=True).stdout
    *figures, kilobytes = map(float, printed.split())
    return figures, kilobytes * 1024 / 1e9


def main(arguments: Arguments) -> None:
    if arguments.only:
        what, _, name = arguments.only.partition(":")
        folder = Path(name)
        work = {
            "write": partial(write, arguments, folder, arguments.steps[0]),
            "draw": partial(draw, folder),
            "place": partial(place_experts, folder),
        }
        work[what]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    rows = []
    for steps in arguments.steps:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (one, compaction), wrote_in = measured(arguments, "write", folder, steps)
            size = (folder / "telemetry.jsonl").stat().st_size
            (drawn, alerts), drew_in = measured(arguments, "draw", folder, steps)
            (placed, _), placed_in = measured(arguments, "place", folder, steps)
            # What was appended is compacted already.
            if not arguments.appended:
                (_, still), _ = measured(arguments, "draw", folder / COMPACTED, steps)
        records = steps // arguments.every
        rows.append(
            {
                "steps": f"{steps:,}",
                "records": f"{records:,}",
                "file": f"{size / 1e6:.0f} MB",
                "a record": f"{1e3 * one:.0f} ms",
                "compaction": f"{compaction:.1f} s",
                "writer's memory": f"{wrote_in:.2f} GB",
                "plot": f"{drawn:.1f} s",
                "plot's memory": f"{drew_in:.2f} GB",
                "place": f"{placed:.1f} s",
                "place's memory": f"{placed_in:.2f} GB",
                "alerts": f"{alerts:.0f}",
            }
        )
        if not arguments.appended:
            rows[-1]["compacted"] = f"{still:.0f}"
        print(*rows[-1].values(), sep=", ", file=sys.stderr, flush=True)  # large ones take minutes
    title = f"{arguments.layers} layers of {arguments.experts} experts, {arguments.ranks} ranks"
    display.print_table(rows, title=title)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
