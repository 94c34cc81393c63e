"""Whole training steps with glibc's defaults, with freed memory kept, and with huge pages besides.

    python benchmarks/allocator.py
    python benchmarks/allocator.py --flavor debugmodel --turns 7 --json figures.json

A process settles at its start how it allocates, so each contender is a run of its own, as
``ezpz-moe train`` starts its worker. The runs take turns: what slows the machine slows all alike. A
step is the time between two lines of the log. Processor time and page faults are of the same steps,
and change little with what else runs; peak memory is the log's. The figures are in
docs/internals/cpu-memory.md.

Linux only.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from step import FLAVORS, JOB, median_interval

from ezpz_moe.cli import display
from ezpz_moe.hosts.cpu import CpuDeviceModule
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.tools.allocator import VARIABLE

DEFAULT, KEPT, HUGE = "glibc's defaults", "memory kept", "kept, huge pages"
CONTENDERS = {
    DEFAULT: {VARIABLE: "0"},
    KEPT: {VARIABLE: "1"},
    HUGE: {VARIABLE: "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
_ALONE |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
_WARM_UP = 4  # steps: the optimizer's states are made in the first
_LINE = re.compile(r"step:\s+\d+ .*memory:\s*([\d.]+)GiB")


@dataclass(frozen=True)
class Arguments:
    """Train in turns with each way to allocate, and compare the time and memory of a step."""

    flavor: Literal["debugmodel", "500M_scaled"] = "500M_scaled"
    turns: int = 5
    steps: int = 16
    """Steps of a run that count."""
    json: Path | None = None
    """Write the figures of every run to this file."""


@dataclass(frozen=True)
class Moment:
    """What a process has used when a line of its log appears: seconds, and a count."""

    clock: float
    user: float
    system: float
    faults: int


@dataclass(frozen=True)
class Run:
    """A step of one run: the median of its seconds, the means of the rest, and the peak in GiB."""

    seconds: float
    user: float
    system: float
    faults: float
    peak: float


def moment(pid: int) -> Moment:
    # proc(5); the name in parentheses, the second field, may contain spaces.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    faults, user, system = (int(fields[number - 3]) for number in (10, 14, 15))
    per_second = os.sysconf("SC_CLK_TCK")
    return Moment(time.perf_counter(), user / per_second, system / per_second, faults)


def measure(contender: str, arguments: Arguments, folder: Path) -> Run:
    """Train once, in a process of its own."""
    steps = _WARM_UP + arguments.steps
    command = [sys.executable, "-m", "ezpz_moe.train", "--module", "ezpz_moe"]
    command += ["--config", str(folder / "job.toml"), "--dump-folder", str(folder / "dump")]
    command += ["--training.steps", str(steps), "--metrics.disable-color-printing"]
    clean = {name: text for name, text in os.environ.items() if "MALLOC" not in name}
    moments, peaks, log = [], [], []
    with subprocess.Popen(
        command,
        env={**clean, **_ALONE, **CONTENDERS[contender]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            log.append(line)
            if found := _LINE.search(line):
                moments.append(moment(process.pid))
                peaks.append(float(found[1]))
    if process.returncode or len(moments) != steps:
        sys.exit(f"{contender}: exit code {process.returncode}\n{''.join(log[-20:])}")
    return summary(moments[_WARM_UP - 1 :], max(peaks))


def summary(moments: Sequence[Moment], peak: float) -> Run:
    """The steps between the moments."""
    clocks = [each.clock for each in moments]
    first, last, steps = moments[0], moments[-1], len(moments) - 1
    return Run(
        seconds=statistics.median(b - a for a, b in pairwise(clocks)),
        user=(last.user - first.user) / steps,
        system=(last.system - first.system) / steps,
        faults=(last.faults - first.faults) / steps,
        peak=peak,
    )


def in_turns(arguments: Arguments, tick: Callable[[str], None]) -> dict[str, list[Run]]:
    """All runs by contender; each turn begins with another one."""
    runs: dict[str, list[Run]] = {name: [] for name in CONTENDERS}
    order = deque(CONTENDERS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "timed.toml").write_text(FLAVORS[arguments.flavor])
        job = JOB.read_text().replace("debugmodel_sdpa_for_loop", "timed_sdpa_for_loop")
        (folder / "job.toml").write_text(job)
        for turn in range(arguments.turns):
            for name in order:
                tick(f"{name}, turn {turn + 1}")
                runs[name].append(measure(name, arguments, folder))
            order.rotate()
    return runs


def row(name: str, runs: dict[str, list[Run]]) -> dict[str, str]:
    """What the runs have in common; ratios are taken within a turn."""

    def median_of(value: Callable[[Run], float]) -> float:
        return statistics.median(map(value, runs[name]))

    pairs = list(zip(runs[DEFAULT], runs[name], strict=True))
    speeds = [other.seconds / own.seconds for other, own in pairs]
    of_processor = [(a.user + a.system) / (b.user + b.system) for a, b in pairs]
    low, high = median_interval(speeds)
    return {
        "allocator": name,
        "s / step": f"{median_of(lambda run: run.seconds):.3f}",
        "speed": f"{statistics.median(speeds):.3f}",
        "from": f"{low:.3f}",
        "to": f"{high:.3f}",
        "user s": f"{median_of(lambda run: run.user):.3f}",
        "system s": f"{median_of(lambda run: run.system):.3f}",
        "speed by processor time": f"{statistics.median(of_processor):.3f}",
        "page faults": f"{median_of(lambda run: run.faults):.0f}",
        "peak GiB": f"{median_of(lambda run: run.peak):.2f}",
        "memory": f"{statistics.median(own.peak / other.peak for other, own in pairs):.3f}",
    }


def report(arguments: Arguments, runs: dict[str, list[Run]]) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": date.today().isoformat(),
        "device": CpuDeviceModule().get_device_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "torchtitan": host_name()},
        "runs": {name: [asdict(run) for run in each] for name, each in runs.items()},
    }


def main(arguments: Arguments) -> None:
    with display.steps("Training", arguments.turns * len(CONTENDERS)) as tick:
        runs = in_turns(arguments, tick)
    title = f"{arguments.flavor}, {arguments.turns} turns, {torch.get_num_threads()} threads"
    display.print_table([row(name, runs) for name in runs], title=title)
    if arguments.json:
        arguments.json.write_text(json.dumps(report(arguments, runs), indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
