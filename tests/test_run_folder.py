"""One run in a folder, steps that are whole, and steps that are left behind.

Nothing here trains but the last two, which are refused or go back.
"""

import dataclasses
import errno
import fcntl
import functools
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import dialect
import fork_server
import psutil
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torchtitan.components.checkpointer import CheckpointManager
from trainer_runs import job_folder, train

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import run_folder
from ezpz_moe.telemetry import json_lines
from ezpz_moe.tools import allocator, launch
from ezpz_moe.tools.resume_point import flags_to_resume
from ezpz_moe.tools.trainer_settings import CheckpointSettings

# --- one run in a folder ----------------------------------------------------------------------

HOLD = """
import sys
from ezpz_moe.hosts import run_folder
run_folder.hold(sys.argv[1])
assert "torch" not in sys.modules
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that trains in ``tmp_path / "run"``, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


@pytest.fixture(autouse=True)
def _this_process_holds_nothing():
    yield
    for file in run_folder._held.values():
        os.close(file)
    run_folder._held.clear()


@pytest.mark.parametrize("ask", [run_folder.hold, run_folder.refuse_if_held])
def test_the_second_run_in_a_folder_is_refused_by_name(ask, other, tmp_path):
    with pytest.raises(EzpzError) as error:
        ask(str(tmp_path / "run"))
    assert str(error.value).startswith(
        f"{tmp_path}/run: process {other.pid} on {os.uname().nodename} is training in this folder."
    )
    assert "\n" not in str(error.value)
    ask(str(tmp_path / "another"))


def test_launchers_that_ask_at_once_do_not_refuse_each_other(tmp_path):
    """As on several machines with one file system."""
    run_folder.hold(str(tmp_path))
    os.close(run_folder._held.pop(tmp_path))
    with (tmp_path / run_folder.LOCK).open("r+") as asked:
        fcntl.flock(asked, fcntl.LOCK_SH)  # as another launcher's does for an instant
        run_folder.refuse_if_held(str(tmp_path))
        with pytest.raises(EzpzError, match="is training in this folder"):
            run_folder.hold(str(tmp_path))


def test_a_killed_run_frees_its_folder(other, tmp_path):
    other.kill()
    other.wait()
    run_folder.refuse_if_held(str(tmp_path / "run"))
    run_folder.hold(str(tmp_path / "run"))
    assert f"process {os.getpid()} " in (tmp_path / "run" / run_folder.LOCK).read_text()


def test_a_fork_does_not_keep_the_folder_of_a_run_that_has_ended(tmp_path):
    """Such as a data loader's worker, which lives on for seconds."""
    run_folder.hold(str(tmp_path))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pool.apply(os.getpid)  # it runs
        os.close(run_folder._held.pop(tmp_path))  # as the end of this process would
        run_folder.refuse_if_held(str(tmp_path))


def test_a_process_may_hold_its_folder_twice_and_asking_does_not_hold_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_folder.refuse_if_held("run")
    assert not (tmp_path / "run").exists()
    run_folder.hold("run")
    run_folder.hold("./run/../run")
    with pytest.raises(EzpzError, match=rf"process {os.getpid()} "):
        run_folder.refuse_if_held("run")


def test_without_locks_there_is_one_warning(tmp_path, monkeypatch, caplog):
    """No file system here is without, so this stands for Lustre without `flock`."""

    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    run_folder.refuse_if_held(str(tmp_path))
    run_folder.hold(str(tmp_path))
    run_folder.refuse_if_held(str(tmp_path))
    (line,) = caplog.messages
    assert line.startswith(f"ezpz_moe: {tmp_path} cannot be locked: [Errno 38] Function not impl")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EzpzError, match="file/run: cannot be written to: Not a directory"):
        run_folder.hold(str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("rank", "mode", "checkpoint", "telemetry", "holds"),
    [
        ("0", "default", (True, False), None, True),
        ("0", "default", (False, False), {}, True),
        ("0", "default", (True, True), None, False),
        ("0", "default", (False, False), None, False),
        ("1", "default", (True, False), {}, False),
        ("0", "fake_backend", (True, False), {}, False),
        (None, "default", (True, False), {}, False),
    ],
)
def test_rank_0_of_a_run_that_writes_holds_its_folder(
    rank, mode, checkpoint, telemetry, holds, tmp_path, monkeypatch
):
    """Nobody else makes a file: not another rank, ``preflight``, nor what has no rank."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    config = SimpleNamespace(
        checkpoint=SimpleNamespace(enable=checkpoint[0], load_only=checkpoint[1]),
        metrics=SimpleNamespace(telemetry=telemetry),
        comm=SimpleNamespace(mode=mode),
    )
    run_folder.hold_for(config, str(tmp_path))
    assert [each.name for each in tmp_path.iterdir()] == [run_folder.LOCK] * holds


# --- steps ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder of steps 2, 4 and 6 as DCP writes them, and 8, which was killed at it."""
    folder = tmp_path_factory.mktemp("saved")
    state = {"weight": torch.arange(9.0), "optimizer.weight": torch.arange(9.0)}
    torch.save(state, folder / "state")
    for step in (2, 4, 6):
        torch_save_to_dcp(folder / "state", folder / f"step-{step}")
    (folder / "step-8").mkdir()
    (folder / "state").unlink()
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def settings(folder: Path, load_step: int | None = None) -> CheckpointSettings:
    return CheckpointSettings(True, True, str(folder.parent), folder, load_step)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGE = {
    "a data file is cut": (
        lambda newest: cut(newest / "__0_0.distcp"),
        r"step-6/__0_0\.distcp: is truncated, at \d+ of \d+ bytes",
    ),
    "a data file is gone": (
        lambda newest: (newest / "__0_0.distcp").unlink(),
        r"step-6/__0_0\.distcp: is missing",
    ),
    "the metadata are cut": (
        lambda newest: cut(newest / ".metadata"),
        r"step-6/\.metadata: cannot be read",
    ),
    "a copy has the newest name": (
        lambda newest: shutil.copytree(newest, newest.with_name("step-61.bak")),
        r"step-61\.bak: the trainer takes it for step-61, which is not there",
    ),
}


def test_a_whole_newest_step_is_left_to_the_trainer(folder, tmp_path):
    for from_last_whole in (False, True):
        assert flags_to_resume(settings(folder), from_last_whole=from_last_whole) == []
        assert flags_to_resume(settings(folder, 2), from_last_whole=from_last_whole) == []
        empty = settings(tmp_path / "none")
        assert flags_to_resume(empty, from_last_whole=from_last_whole) == []


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_newest_step_is_named_with_the_one_to_resume_from(what, folder):
    damage, message = DAMAGE[what]
    damage(folder / "step-6")
    whole = 6 if "copy" in what else 4
    with pytest.raises(EzpzError, match=message) as error:
        flags_to_resume(settings(folder), from_last_whole=False)
    assert f"Add --resume-from-last-whole to resume from step-{whole}." in str(error.value)
    assert "\n" not in str(error.value)
    flags = flags_to_resume(settings(folder), from_last_whole=True)
    assert flags == ["--checkpoint.load_step", str(whole)]


def test_a_step_of_the_model_alone_is_not_whole(folder):
    model = {"weight": torch.zeros(9)}
    torch.save(model, folder / "state")
    torch_save_to_dcp(folder / "state", folder / "step-9")
    assert flags_to_resume(settings(folder), from_last_whole=True) == [
        "--checkpoint.load_step",
        "6",
    ]
    for step in (2, 4, 6, 9):
        shutil.rmtree(folder / f"step-{step}")
    torch_save_to_dcp(folder / "state", folder / "step-0")  # a seed
    assert flags_to_resume(settings(folder), from_last_whole=True) == []


@pytest.mark.parametrize("from_last_whole", [False, True])
def test_the_step_that_a_job_names_has_to_be_whole(from_last_whole, folder):
    cut(folder / "step-4" / ".metadata")
    for step, message in (
        (4, r"step-4/\.metadata: cannot"),
        (5, "step-5: there is no such folder"),
    ):
        with pytest.raises(EzpzError, match=message) as error:
            flags_to_resume(settings(folder, step), from_last_whole=from_last_whole)
        assert "Set checkpoint.load_step to 6, which is whole." in str(error.value)


def test_a_step_that_a_job_names_where_there_is_none(tmp_path):
    """Another dump folder would not help: that one has no such step either."""
    with pytest.raises(EzpzError) as error:
        flags_to_resume(settings(tmp_path / "none", 2), from_last_whole=False)
    assert str(error.value).endswith(
        "There is no checkpoint at all: without checkpoint.load_step the run begins at step 1."
    )


@pytest.mark.parametrize("from_last_whole", [False, True])
def test_a_step_behind_the_last_one_is_refused(from_last_whole, folder):
    """Nothing would be trained; of some schedules the trainer has no learning rate there."""
    ends = functools.partial(dataclasses.replace, settings(folder))
    with pytest.raises(
        EzpzError, match=r"step-6: is of step 6, and training\.steps is 5, so"
    ) as no:
        flags_to_resume(ends(last_step=5), from_last_whole=from_last_whole)
    assert "Set training.steps above 6, resume from an earlier step" in str(no.value)
    for may in (
        {"last_step": 6},  # a job script that is started once more
        {"last_step": 5, "load_step": 4},
        {"last_step": 5, "loads_step": False},  # it begins at step 1
    ):
        assert flags_to_resume(ends(**may), from_last_whole=from_last_whole) == []


def test_the_last_whole_step_needs_checkpoints(folder):
    off = dataclasses.replace(settings(folder), is_enabled=False)
    with pytest.raises(EzpzError, match="checkpoints are off"):
        flags_to_resume(off, from_last_whole=True)
    assert flags_to_resume(off, from_last_whole=False) == []


def test_a_step_that_only_another_torch_reads_is_passed_over(folder, monkeypatch):
    """Or the flag of the message would resume from the very step that was refused."""
    read = FileSystemReader.read_metadata

    def another_form(reader, *how):
        if reader.path.name == "step-6":
            raise ValueError("too many values to unpack")
        return read(reader, *how)

    monkeypatch.setattr(FileSystemReader, "read_metadata", another_form)
    with pytest.raises(EzpzError, match="Resume with the torch that saved it") as error:
        flags_to_resume(settings(folder), from_last_whole=False)
    assert str(error.value).endswith("Add --resume-from-last-whole to resume from step-4.")
    flags = flags_to_resume(settings(folder), from_last_whole=True)
    assert flags == ["--checkpoint.load_step", "4"]


def test_without_any_whole_step_a_new_run_is_what_is_left(folder):
    for step in (2, 4, 6):
        cut(folder / f"step-{step}" / "__0_0.distcp")
    with pytest.raises(EzpzError, match="No other step is whole: start a new run"):
        flags_to_resume(settings(folder), from_last_whole=False)
    with pytest.raises(EzpzError, match="no step in it is whole"):
        flags_to_resume(settings(folder), from_last_whole=True)
    with pytest.raises(EzpzError, match=r"a new run, without checkpoint\.load_step and in another"):
        flags_to_resume(settings(folder, 4), from_last_whole=False)


def found_by_host(folder: Path) -> int:
    return CheckpointManager._find_load_step(SimpleNamespace(folder=str(folder)))


def test_later_steps_are_moved_where_the_host_does_not_look(folder, caplog):
    shutil.copytree(folder / "step-6", folder / "step-61.bak")
    before = {each.name for each in folder.iterdir()}
    run_folder.return_to(4, folder)
    assert found_by_host(folder) == 4
    aside = folder / "abandoned-1"
    assert {each.name for each in aside.iterdir()} == {"step-6", "step-8", "step-61.bak"}
    (line,) = caplog.messages
    assert f"{aside}: step-6, step-8, step-61.bak." in line
    run_folder.return_to(4, folder)
    run_folder.return_to(2, folder)
    assert found_by_host(folder) == 2
    assert [each.name for each in (folder / "abandoned-2").iterdir()] == ["step-4"]
    # Moved back as the message says, they are found again.
    for each in [*aside.iterdir(), *(folder / "abandoned-2").iterdir()]:
        each.rename(folder / each.name)
    assert {each.name for each in folder.iterdir()} == {*before, "abandoned-1", "abandoned-2"}


# --- a launcher that is killed ----------------------------------------------------------------

WORKER = """
import runpy, time
from ezpz_moe.hosts import detect

def host(*_, **__):
    print("training", flush=True)
    time.sleep(60)

detect.check_host = lambda: None
run_module, runpy.run_module = runpy.run_module, host
run_module("ezpz_moe.train", run_name="__main__")
"""
LAUNCHER = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], start_new_session=True)
print(worker.pid, flush=True)
worker.wait()
"""


def test_no_worker_outlives_a_killed_launcher():
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        env={**os.environ, "TORCHELASTIC_RUN_ID": "1", allocator.VARIABLE: "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = psutil.Process(int(launcher.stdout.readline()))
    assert launcher.stdout.readline() == "training\n"
    launcher.kill()
    launcher.wait()
    worker.wait(timeout=30)
    launcher.stdout.close()


# --- real runs --------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path) -> Path:
    folder = job_folder(tmp_path / "job")
    (folder / "tiny_watched.toml").write_text('inherits = "tiny"\n[telemetry]\nevery = 1\n')
    job = folder / "job.toml"
    job.write_text(job.read_text().replace('"tiny_sdpa"', '"tiny_watched_sdpa"'))
    return job


@pytest.mark.parametrize("flag", ["--checkpoint.enable", "--checkpoint.no-enable"])
@pytest.mark.train
def test_the_hosts_own_command_is_refused_in_a_folder_where_a_run_writes(flag, other, job):
    """With checkpoints, and with telemetry alone."""
    folder = other.args[-1]
    result = subprocess.run(
        [
            *(fork_server.python(), "-m", "torchtitan.train", "--module", "ezpz_moe"),
            *("--config", str(job), "--dump-folder", folder, flag),
        ],
        env={**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    (line,) = [each for each in result.stderr.splitlines() if "ezpz-moe" in each]
    assert line.startswith(f"ezpz-moe: error: {folder}: process {other.pid} on ")
    assert "Traceback" not in result.stderr + result.stdout


def test_the_launcher_refuses_before_it_starts_anything(other, job):
    flags = ["--dump-folder", other.args[-1], "--checkpoint.enable"]
    with pytest.raises(EzpzError, match=f"process {other.pid} on "):
        launch.train(str(job), flags, tell=print)


@pytest.mark.train
def test_a_return_to_an_earlier_step_leaves_the_abandoned_ones_behind(job):
    """Retention and the next start see the new attempt's steps alone, and so does telemetry."""
    flags = ["--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep-latest-k", "2"]
    arguments = dialect.job(job, *flags, dialect.DUMP_FOLDER, str(job.parent / "run"))
    back = ["--checkpoint.load-step", "2", "--training.steps", "3"]
    train({"first": [*arguments, "--training.steps", "4"]}, job.parent, ranks=1)
    train({"second": [*arguments, *back]}, job.parent, ranks=1)
    checkpoints = job.parent / "run" / "checkpoint"
    assert found_by_host(checkpoints) == 3
    assert {each.name for each in checkpoints.iterdir()} == {"step-2", "step-3", "abandoned-1"}
    abandoned = {each.name for each in (checkpoints / "abandoned-1").iterdir()}
    assert abandoned == {"step-3", "step-4"}
    assert "the run goes back to step 2" in (job.parent / "log.txt").read_text()
    records = json_lines.read(job.parent / "run" / json_lines.FILE_NAME)
    assert [each.step for each in records] == [1, 2, 3]


@pytest.mark.full
@pytest.mark.train
def test_a_run_whose_newest_step_is_damaged_resumes_from_the_one_before(job):
    """By the command of the message, which leaves the damaged step beside the others."""
    said = ezpz_moe("train", job, "--training.steps", "3")
    assert said.returncode == 0, said.stderr
    checkpoints = job.parent / "outputs" / "checkpoint"
    cut(checkpoints / "step-3" / ".metadata")
    refused = ezpz_moe("train", job, "--training.steps", "4")
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("ezpz-moe: error: outputs/checkpoint/step-3/.metadata: cannot be read")
    assert line.endswith("Add --resume-from-last-whole to resume from step-2.")
    said = ezpz_moe("train", job, "--training.steps", "4", "--resume-from-last-whole")
    assert said.returncode == 0, said.stderr
    assert "Training starts at step 3" in said.stdout
    assert {each.name for each in checkpoints.iterdir()} == {
        *("step-1", "step-2", "step-3", "step-4"),
        "abandoned-1",
    }
    assert [each.name for each in (checkpoints / "abandoned-1").iterdir()] == ["step-3"]


def ezpz_moe(command: str, job: Path, *flags: str) -> subprocess.CompletedProcess:
    code = "import sys; from ezpz_moe.cli import main; sys.exit(main())"
    flags = (*flags, "--checkpoint.enable", "--checkpoint.interval", "1")
    return subprocess.run(
        [fork_server.python(), "-c", code, command, job.name, *flags],
        cwd=job.parent,
        env={**os.environ, "PYTHON_EXEC": fork_server.python(), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
