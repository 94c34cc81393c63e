"""Runs of the debug job with a flavor of one's own, for the scripts beside this one."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from ezpz_moe.telemetry.json_lines import FILE_NAME

JOB = Path(__file__).parent.parent / "flavors" / "jobs" / "debug_cpu.toml"
_ITS_FLAVOR = "debugmodel_sdpa_for_loop"
_STEP = re.compile(
    r"step: +(\d+) .*?loss: +([\d.]+|nan) .*?tps: +([\d,]+).* CPU seconds so far: ([\d.]+)"
)


class LoggedStep(NamedTuple):
    """What the trainer logs of a step, and of a dense model too.

    ``cpu_seconds`` are those of the run until then: what else a machine does changes them less than
    it does the clock.
    """

    step: int
    loss: float
    tokens_per_second: float
    cpu_seconds: float


def train(
    flavors: Mapping[str, str],
    folder: Path,
    steps: int,
    *,
    suffix: str = "",
    flags: Sequence[str] = (),
    tables: str = "",
) -> list[LoggedStep]:
    """Train ``steps`` steps of the debug job, in ``folder``, with a flavor of one's own.

    A run of as many steps of the same flavors and job that is there is not repeated. Its log is
    log.txt.

    Args:
        flavors: texts by name. The first is trained; the others are what it names.
        suffix: of the trained flavor's name, such as ``_sdpa_for_loop``.
        flags: of the trainer, beside the number of steps and the folder.
        tables: what the job says besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = JOB.read_text()
    assert _ITS_FLAVOR in job
    job = job.replace(_ITS_FLAVOR, next(iter(flavors)) + suffix) + tables
    texts = {**flavors, "job": job}
    files = {folder / f"{name}.toml": text for name, text in texts.items()}
    log_file = folder / "log.txt"
    if all(file.exists() and file.read_text() == text for file, text in files.items()):
        logged = steps_of(log_file.read_text()) if log_file.exists() else []
        # A run that was broken off, or a shorter one, is none.
        if logged and logged[-1].step == steps:
            return logged
    (folder / FILE_NAME).unlink(missing_ok=True)  # or the record of another run would go on
    for file, text in files.items():
        file.write_text(text)
    command = [sys.executable, "-m", "ezpz_moe.cli", "train", str(folder / "job.toml")]
    command += ["--training.steps", str(steps), "--dump-folder", str(folder), *flags]
    _run([*command, "--metrics.disable-color-printing"], log_file)
    return steps_of(log_file.read_text())


def steps_of(log: str) -> list[LoggedStep]:
    """What a log of the trainer says of each step."""
    return [
        LoggedStep(int(step), float(loss), float(tps.replace(",", "")), float(cpu_seconds))
        for step, loss, tps, cpu_seconds in _STEP.findall(log)
    ]


def _run(command: Sequence[str], log_file: Path) -> None:
    """Run the trainer, and say in its log with each step how much of a CPU it took until then."""
    with (
        log_file.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as running,
    ):
        assert running.stdout
        for line in running.stdout:
            said = line.rstrip("\n")
            if " step: " in line:
                said += f" CPU seconds so far: {_cpu_seconds(running.pid):.2f}"
            print(said, file=log, flush=True)
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)


def _cpu_seconds(process: int) -> float:
    """Of a process that runs, and those that it has started."""
    first = psutil.Process(process)
    taken = [each.cpu_times() for each in (first, *first.children(recursive=True))]
    return sum(each.user + each.system for each in taken)
