"""What a run does with its folder and with SIGTERM, whichever door it came in by."""

import os
import signal
import subprocess
import time
from pathlib import Path

import dialect
import fork_server
import pytest
from trainer_runs import HERE, job_folder, of_rank

from ezpz_moe.hosts import run_folder

DOORS = ("door 1",) if dialect.ON_0_2 else ("door 1", "door 2")
PATIENCE = 300
"""Seconds, before anything counts as a hang."""
FIRST_STEP = "step:  1"

pytestmark = [pytest.mark.train, pytest.mark.smoke]


class Run:
    """A run of one rank that writes checkpoints into ``dump``, and would not end by itself."""

    def __init__(self, door: str, folder: Path, dump: Path, name: str, *more: str) -> None:
        flags = [dialect.DUMP_FOLDER, str(dump), "--checkpoint.enable", "--metrics.log-freq", "1"]
        if door == "door 1":
            arguments = dialect.job(folder / "job.toml", "--training.steps", "100000")
        else:
            arguments = dialect.with_backend("deepseek_v3", "for_loop", folder, steps=100000)
        self._log = folder / f"{name}.txt"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(fork_server.python(), str(HERE / "run_trainer.py")),
                    *(str(folder / name), *flags, *arguments, *more),
                ],
                env={**os.environ, **of_rank(0, 1, folder)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self._log.read_text()

    def trains(self) -> bool:
        """Wait until it is at its first step, or has ended."""
        give_up = time.monotonic() + PATIENCE
        while FIRST_STEP not in self.said() and self.process.poll() is None:
            assert time.monotonic() < give_up, self.said()
            time.sleep(0.05)
        return FIRST_STEP in self.said()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("one_run"))
    dialect.write_text(folder)
    return folder


@pytest.fixture(scope="module", params=DOORS)
def first(request, folder) -> tuple[Run, Path]:
    """A run at its first step, and its dump folder."""
    dump = folder / f"run by {request.param}"
    with Run(request.param, folder, dump, f"first by {request.param}") as run:
        assert run.trains(), run.said()
        yield run, dump


def contents(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("door", DOORS)
def test_the_second_run_in_a_folder_is_refused_before_it_writes(door, first, folder):
    run, dump = first
    before = contents(dump)
    with Run(door, folder, dump, f"second by {door}") as second:
        assert not second.trains()
    assert second.process.returncode == 2, second.said()
    (line,) = [each for each in second.said().splitlines() if "ezpz-moe" in each]
    assert line.startswith(f"ezpz-moe: error: {dump}: process ")
    assert "is training in this folder" in line
    assert "Traceback" not in second.said()
    assert "size:" not in second.said()  # no model was built
    assert contents(dump) == before
    assert run.process.poll() is None


def test_a_run_that_sigterm_ends_without_saving_says_so(first):
    run, _ = first
    said = run.said().count("ezpz_moe: SIGTERM")
    assert said == (dialect.ON_0_2 or "ezpz_moe.overrides.experts" in run.said())


@pytest.mark.skipif(dialect.ON_0_2, reason="torchtitan 0.2 has no overrides")
def test_the_override_of_the_checkpointer_saves_the_step_on_sigterm(folder):
    dump = folder / "run to stop"
    ours = "ezpz_moe.overrides.checkpointer"
    with Run("door 2", folder, dump, "stopped", ours) as run:
        assert run.trains(), run.said()
        run.process.send_signal(signal.SIGTERM)
        code = run.process.wait(PATIENCE)
    assert code == 128 + signal.SIGTERM, run.said()
    (saved,) = run_folder.steps(dump / "checkpoint").values()
    assert f"ezpz_moe: SIGTERM: the run ends after step {saved}" in run.said()
    assert "ezpz_moe: SIGTERM will" not in run.said()
