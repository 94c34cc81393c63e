"""SIGTERM ends a run with the step that it is at, and the launcher says where the run resumes.

The first half is the agreement alone, of threads that stand for ranks; the second starts runs of
two ranks over gloo.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fork_server
import psutil
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from trainer_runs import job_folder

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.titan import checkpointer, resuming, saving, stopping
from ezpz_moe.hosts.titan.stopping import Agreement
from ezpz_moe.tools import launch
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.nodes import Node
from ezpz_moe.tools.trainer_settings import CheckpointSettings

# --- the agreement ----------------------------------------------------------------------------

RANKS = 4
PATIENCE = 30
"""Seconds before anything counts as a hang."""


class Steps:
    """Ranks that are at most ``lead`` steps apart, because they wait for one another in each."""

    def __init__(self, lead: int) -> None:
        self._lead, self._started = lead, [0] * RANKS
        self._changed = threading.Condition()

    def start(self, rank: int, step: int) -> None:
        with self._changed:
            self._started[rank] = step
            self._changed.notify_all()
            together = self._changed.wait_for(
                lambda: min(self._started) > step - self._lead, PATIENCE
            )
            assert together, f"rank {rank} waits at step {step} for {self._started}"


@pytest.mark.parametrize("lead", [1, 5])
@pytest.mark.parametrize("draw", range(5))
def test_all_ranks_end_at_one_step_that_none_has_passed(lead, draw):
    """Whoever asks, whenever each hears of it, and however far they are apart."""
    store, steps, chance = torch.distributed.HashStore(), Steps(lead), random.Random(draw)
    agreements = [Agreement(store, rank, RANKS, passed=0) for rank in range(RANKS)]
    delays = [[chance.random() * 0.01 for _ in range(200)] for _ in range(RANKS)]
    hears = [chance.random() * 0.1 for _ in range(RANKS)]
    ended, at_request = [0] * RANKS, [0]

    def train(rank: int) -> None:
        for step, delay in enumerate(delays[rank], start=1):
            steps.start(rank, step)
            time.sleep(delay)
            if agreements[rank].ends_at(step):
                ended[rank] = step
                return

    def listen(rank: int) -> None:
        time.sleep(hears[rank])
        if rank == draw % RANKS:
            at_request[0] = max(steps._started)
            agreements[rank].ask()
        while not agreements[rank].is_asked():
            time.sleep(0.001)
        agreements[rank].promise()
        while agreements[rank].end() is None:
            time.sleep(0.001)

    threads = [
        threading.Thread(target=work, args=[rank], daemon=True)
        for rank in range(RANKS)
        for work in (train, listen)
    ]
    for each in threads:
        each.start()
    give_up = time.monotonic() + PATIENCE
    for each in threads:
        each.join(max(0, give_up - time.monotonic()))
    assert len(set(ended)) == 1
    # No later than what somebody had begun by the time that the last one heard of it.
    assert at_request[0] - lead < ended[0] < 200


def test_a_save_under_way_is_the_one_that_the_run_ends_with():
    """A rank asks only after it has saved; who is told meanwhile promises that step."""
    agreement = Agreement(torch.distributed.HashStore(), 0, 1, passed=6)
    agreement.ask()
    agreement.promise()
    assert agreement.end() == 7
    assert agreement.ends_at(7)


def test_a_run_ends_by_itself_before_a_step_that_it_does_not_have():
    agreement = Agreement(torch.distributed.HashStore(), 0, 1, passed=0)
    assert not agreement.ends_at(1)
    agreement.ask()
    agreement.promise()
    assert agreement.end() == 2


def test_a_rank_that_has_ended_is_noticed():
    store = torch.distributed.HashStore()
    process = subprocess.Popen([sys.executable, "-c", ""])
    agreement = Agreement(store, 0, 3, passed=0)
    store.set("pid/1", str(process.pid))
    assert not agreement.has_lost(range(3))  # rank 2 has not said anything yet
    process.wait()
    assert agreement.has_lost(range(3))
    assert not agreement.has_lost(range(1))


IN_A_FORK = """
import os, signal, time
import torch
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
from ezpz_moe.hosts.titan.stopping import Stopping
stopping = Stopping(passed=0)
child = os.fork()
if child == 0:
    time.sleep(20)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
time.sleep(0.2)
assert not stopping.ends_at(1)
os.kill(os.getpid(), signal.SIGTERM)
step = 2
while not stopping.ends_at(step):
    step += 1
    time.sleep(0.01)
stopping.close()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""


def test_a_process_of_the_run_dies_of_its_own_sigterm_alone():
    """As a data loader's worker; and after the last step the run itself does too."""
    result = subprocess.run(
        [fork_server.python(), "-c", IN_A_FORK],
        capture_output=True,
        text=True,
        check=False,
        timeout=10 * PATIENCE,
    )
    assert result.returncode == -signal.SIGTERM, result.stderr


AFTER_THE_LAST_STEP = """
import os, signal, subprocess, sys, time
import torch
from ezpz_moe.hosts.titan import stopping

store = torch.distributed.HashStore()
group = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=group)
torch.distributed.get_world_size = lambda: 2
stopping._store = lambda _: store
other = subprocess.Popen([sys.executable, "-c", ""])
other.wait()
store.set("pid/1", str(other.pid))
os.environ["LOCAL_WORLD_SIZE"] = "2"
listening = stopping.Stopping(passed=3)
listening.finish()
os.kill(os.getpid(), signal.SIGTERM)
while not store.check(["promise/0"]):
    time.sleep(0.01)
time.sleep(0.2)
listening.close()
torch.distributed.destroy_process_group()
time.sleep(0.2)
"""


def test_after_the_last_step_a_rank_does_not_miss_those_that_have_ended():
    """Rank 0 sleeps two seconds then. Whoever ends first is not lost, and has left the group."""
    result = subprocess.run(
        [fork_server.python(), "-c", AFTER_THE_LAST_STEP],
        capture_output=True,
        text=True,
        check=False,
        timeout=10 * PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    assert "SIGTERM" not in result.stdout + result.stderr


WITH_A_SILENT_STORE = """
import time
import torch
from ezpz_moe.hosts.titan import stopping

class Silent:
    def set(self, *_):
        pass

    def check(self, _):
        print("asked", flush=True)
        time.sleep(600)

store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
stopping._store = lambda _: Silent()
listening = stopping.Stopping(passed=0)
time.sleep(1.5)
listening.close()
listening.close()
"""


def test_a_run_can_end_where_the_store_has_gone_silent():
    """As on a machine that is cut off from node 0."""
    result = subprocess.run(
        [fork_server.python(), "-c", WITH_A_SILENT_STORE],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (result.returncode, result.stdout) == (0, "asked\n"), result.stderr


# --- what the launcher says --------------------------------------------------------------------


OFF = "Nothing was saved, because checkpoints are off ([checkpoint] enable)."


@pytest.mark.parametrize(
    ("enabled", "load_step", "steps", "nodes", "expected"),
    [
        (False, None, [4], 1, OFF),
        (True, None, [], 1, ". There is no checkpoint to resume from: it begins at step 1."),
        (True, None, [2, 4], 1, ": it resumes from {}/step-4."),
        (True, 4, [2, 4], 2, " on every node: it resumes from {}/step-4."),
        (True, 2, [2, 4], 1, ", without checkpoint.load_step: it resumes from {}/step-4."),
        (True, 7, [2, 4], 1, ", without checkpoint.load_step: it resumes from {}/step-4."),
    ],
)
def test_a_stopped_run_says_how_it_goes_on(enabled, load_step, steps, nodes, expected, tmp_path):
    for step in steps:
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / ".metadata").touch()
    (tmp_path / "step-9").mkdir()  # the signal came while it was written
    settings = CheckpointSettings(enabled, enabled, "run", tmp_path, load_step)
    said = []
    of_run = [Node(rank, "host", "address", 1, 1) for rank in range(nodes)] if nodes > 1 else []
    code = launch._Ending(settings, said.append, nodes=of_run).stopped(signal.SIGINT)
    assert code == 128 + signal.SIGINT
    again = "To continue, run the same command again" if enabled else ""
    assert said == [f"ezpz-moe: stopped by SIGINT. {again}{expected.format(tmp_path)}"]


def test_sigterm_after_the_last_step_is_no_failure(tmp_path):
    """The host sleeps two seconds after it; a scheduler would start such a run again."""
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / ".metadata").touch()
    said = []
    for last_step, by, code in (
        (4, signal.SIGTERM, 0),
        (4, signal.SIGINT, 130),  # may have cut a validation off
        (5, signal.SIGTERM, 143),
        (None, signal.SIGTERM, 143),
    ):
        settings = CheckpointSettings(True, True, "run", tmp_path, None, last_step)
        assert launch._Ending(settings, said.append).stopped(by) == code
    assert said[0] == "ezpz-moe: SIGTERM came when the last step had been saved."
    back = launch._Return.of(CheckpointSettings(True, True, "run", tmp_path, 2, 4), [])
    again = CheckpointSettings(True, True, "run", tmp_path, 2, 4)
    assert launch._Ending(again, said.append, back).stopped(signal.SIGTERM) == 143
    only_loads = CheckpointSettings(True, False, "run", tmp_path, None, 4)
    assert launch._Ending(only_loads, said.append).stopped(signal.SIGTERM) == 143


def test_a_run_that_ends_before_it_has_gone_back_still_goes_back(tmp_path):
    """Without ``load_step`` it would resume from the attempt that the user has given up."""
    for step in (2, 4):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / ".metadata").touch()
    by_user = CheckpointSettings(True, True, "run", tmp_path, 2)
    by_launcher = CheckpointSettings(True, True, "run", tmp_path, None)
    said = []
    endings = [
        launch._Ending(settings, said.append, launch._Return.of(settings, flags))
        for settings, flags in ((by_user, []), (by_launcher, ["--checkpoint.load_step", "2"]))
    ]
    for ending in endings:
        ending.stopped(signal.SIGTERM)
    again = "ezpz-moe: stopped by SIGTERM. To continue, run the same command again"
    assert (
        said == [f"{again}: nothing has been saved yet, and it resumes from {tmp_path}/step-2."] * 2
    )
    # Then it goes back, and saves a step of the same name.
    run_folder.return_to(2, tmp_path)
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / ".metadata").touch()
    said.clear()
    for ending in endings:
        ending.stopped(signal.SIGTERM)
    assert said == [
        f"{again}, without checkpoint.load_step: it resumes from {tmp_path}/step-4.",
        f"{again}: it resumes from {tmp_path}/step-4.",
    ]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_ctrl_c_while_saving_or_loading_stays_ctrl_c(tmp_path, monkeypatch):
    """DCP reports it as a failure, of which we would say that the disk needs room."""

    def interrupted(*_, **__) -> None:
        raise KeyboardInterrupt

    manager, layer = object.__new__(checkpointer.Checkpointer), torch.nn.Linear(2, 2)
    manager.folder = str(tmp_path)
    manager.pg, manager.states, model = None, {checkpointer.MODEL: layer}, layer.state_dict()
    manager.dcp_save(model, checkpoint_id=str(tmp_path / "step-1"), async_mode="disabled")
    monkeypatch.setattr(FileSystemWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt), saving.reporting_failure(tmp_path, 2):
        manager.dcp_save(model, checkpoint_id=str(tmp_path / "step-2"), async_mode="disabled")
    monkeypatch.setattr(FileSystemReader, "read_data", interrupted)
    monkeypatch.setattr(resuming, "what_fits", lambda states, _: states)
    with pytest.raises(KeyboardInterrupt):
        manager.dcp_load(model, str(tmp_path / "step-1"), False, False)


# --- runs -------------------------------------------------------------------------------------

SAVING = """
[checkpoint]
enable = true
interval = 1000
"""
COMMAND = "import sys; from ezpz_moe.cli import main; sys.exit(main())"


class Run:
    """``ezpz-moe train`` of two ranks that would not end by themselves."""

    def __init__(self, folder: Path, *flags: str, python: str | None = None) -> None:
        python = python or fork_server.python()
        command = [python, "-c", COMMAND, "train", "job.toml", "--nproc", "2", *flags]
        self.folder = folder
        self._out = (folder / "out.txt").open("w+")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **{key: value for key, value in os.environ.items() if key != "LOG_RANK"},
                "PYTHON_EXEC": python,
                "CUDA_VISIBLE_DEVICES": "",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                "EZPZ_MOE_NATIVE_DTYPES": "float32,bfloat16",
            },
            stdout=self._out,
            stderr=subprocess.PIPE,
            text=True,
        )

    def said(self) -> str:
        return re.sub(r"\x1b\[[\d;]*m", "", (self.folder / "out.txt").read_text())

    def wait_for(self, text: str) -> None:
        give_up = time.monotonic() + 300
        while text not in self.said():
            assert self.process.poll() is None, self.said() + self.process.stderr.read()
            assert time.monotonic() < give_up, self.said()
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        """Return the exit code and the last line of stderr."""
        _, err = self.process.communicate(timeout=300)
        return self.process.returncode, err.splitlines()[-1]

    def workers(self) -> list[psutil.Process]:
        """The real ranks, of a run whose ``python`` is real."""
        started = psutil.Process(self.process.pid).children()
        return [each for each in started if "ezpz_moe.train" in each.cmdline()]


@pytest.fixture
def folder(tmp_path) -> Path:
    job = job_folder(tmp_path) / "job.toml"
    job.write_text(job.read_text().replace("steps = 3", "steps = 100000") + SAVING)
    return tmp_path


@contextlib.contextmanager
def running(folder: Path, *flags: str, **how: str) -> Iterator[Run]:
    run = Run(folder, *flags, **how)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            for each in psutil.Process(run.process.pid).children(recursive=True):
                each.kill()
            run.process.kill()


def saved_steps(folder: Path) -> list[int]:
    whole = (folder / "outputs" / "checkpoint").glob("step-*/.metadata")
    return sorted(int(file.parent.name.removeprefix("step-")) for file in whole)


@pytest.mark.train
@pytest.mark.ranks
def test_sigterm_saves_the_step_of_all_ranks_and_says_where_the_run_resumes(folder):
    with running(folder) as run:
        run.wait_for("step:  2 ")
        run.process.send_signal(signal.SIGTERM)
        code, line = run.finish()
    assert code == 128 + signal.SIGTERM
    (step,) = saved_steps(folder)
    assert step < 10
    assert line == (
        "ezpz-moe: stopped by SIGTERM. To continue, run the same command again: it resumes from "
        f"outputs/checkpoint/step-{step}."
    )
    saved = inspect(folder / "outputs" / "checkpoint" / f"step-{step}")
    assert (saved.step, saved.optimizer, saved.files) == (step, True, 2)
    assert f"the run ends after step {step}," in run.said()
    assert not re.search(rf"step: +{step + 1} ", run.said())


def losses(run: Run) -> dict[int, str]:
    found = re.findall(r"step: +(\d+) +loss: +(\S+)", run.said())
    return {int(step): loss for step, loss in found}


@pytest.mark.full
@pytest.mark.train
@pytest.mark.ranks
@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_stopped_run_goes_on_with_the_losses_that_it_would_have_had(mode, folder):
    """Whatever way it saves; each step is saved, so that a save is under way at the signal."""
    if mode == "async_with_pinned_mem" and not torch.accelerator.is_available():
        pytest.skip("there is no memory to pin without an accelerator")
    # As many steps in each: the schedule of the learning rate depends on it.
    flags = ["--training.steps", "10", "--checkpoint.interval", "1"]
    flags += ["--checkpoint.async-mode", mode]
    with running(folder, *flags) as run:
        run.wait_for("step:  3 ")
        run.process.send_signal(signal.SIGTERM)
        assert run.finish()[0] == 128 + signal.SIGTERM
        first = losses(run)
    assert max(saved_steps(folder)) == max(first) < 10
    with running(folder, *flags) as run:
        assert run.finish()[0] == 0
        second = losses(run)
    assert list(second) == list(range(max(first) + 1, 11))
    with running(folder, *flags, "--dump-folder", "undisturbed") as run:
        assert run.finish()[0] == 0
        assert losses(run) == first | second


@pytest.mark.full
@pytest.mark.train
@pytest.mark.ranks
def test_a_signal_to_one_rank_ends_all_of_them_with_the_same_step(folder):
    with running(folder, python=sys.executable) as run:
        run.wait_for("step:  2 ")
        run.workers()[1].send_signal(signal.SIGTERM)
        code, line = run.finish()
    (step,) = saved_steps(folder)
    assert code == 128 + signal.SIGTERM
    assert line.endswith(f"it resumes from outputs/checkpoint/step-{step}.")


@pytest.mark.full
@pytest.mark.train
@pytest.mark.ranks
def test_a_rank_that_is_killed_does_not_leave_the_others_waiting(folder):
    """torchrun sends them SIGTERM too, which must not look like a wish to save."""
    with running(folder, python=sys.executable) as run:
        run.wait_for("step:  2 ")
        run.workers()[1].kill()
        killed = time.monotonic()
        code, _ = run.finish()
    assert code == 1
    assert time.monotonic() - killed < stopping.SECONDS_TO_AGREE / 2
    assert saved_steps(folder) == []


@pytest.mark.full
@pytest.mark.train
@pytest.mark.ranks
def test_a_killed_launcher_leaves_no_worker_and_no_lock(folder):
    with running(folder, python=sys.executable) as run:
        run.wait_for("step:  2 ")
        workers = run.workers()
        assert len(workers) == 2
        with pytest.raises(EzpzError, match=f"process {workers[0].pid} on "):
            run_folder.refuse_if_held(str(folder / "outputs"))
        run.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive
    run_folder.refuse_if_held(str(folder / "outputs"))
