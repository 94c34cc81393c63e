"""Starting the trainer: what reaches it, what is shown, and what a failure looks like.

The first half replaces what would train; the second half starts real processes.
"""

import dataclasses
import os
import pkgutil
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import fork_server
import psutil
import pytest
import torch

import ezpz_moe.train
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import detect, untested
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.tools import allocator, launch

TINY = Path(__file__).parent / "data" / "tiny"

# What the command line does with its arguments: CONFIG NPROC [FLAG...].
START = """
import sys
from ezpz_moe.errors import exit_on_user_error
from ezpz_moe.cli.display import print_to_stderr
from ezpz_moe.tools.launch import train
with exit_on_user_error():
    sys.exit(train(sys.argv[1], sys.argv[3:], tell=print_to_stderr, nproc=int(sys.argv[2])))
"""


@pytest.fixture
def job(tmp_path) -> Path:
    """A tiny job in a folder of its own, which is the processes' working directory too."""
    return Path(shutil.copytree(TINY, tmp_path / "job")) / "job.toml"


def start(
    job: Path | str, nproc: int, *flags: str, program: str = START, python: str | None = None
) -> subprocess.Popen:
    """The launcher and its workers: forks, which know of one thread, or by ``python`` real."""
    python = python or fork_server.python()
    scratch = Path(job).parent / "scratch"
    scratch.mkdir(exist_ok=True)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOG_RANK", "OMP_NUM_THREADS")
    }
    return subprocess.Popen(
        [python, "-c", program, str(job), str(nproc), *flags],
        cwd=Path(job).parent,
        env={
            **environment,
            "PYTHON_EXEC": python,
            "TMPDIR": str(scratch),
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # torch warns where no name server answers
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(job: Path | str, nproc: int, *flags: str) -> tuple[int, str, str]:
    return finish(start(job, nproc, *flags))


# --- the host's check -------------------------------------------------------------------------


def with_pair(monkeypatch, tmp_path, *pair: str | None) -> None:
    """As if these torch and torchtitan were installed, by a user who has not met them."""
    for module in (detect, untested):
        monkeypatch.setattr(module, "installed_pair", lambda: pair)
    monkeypatch.setenv("EZPZ_MOE_CACHE", str(tmp_path))


@pytest.mark.parametrize("torch_version", ["2.15.0", "2.15.7"])
def test_a_tested_pair_and_its_patch_releases_pass_without_a_warning(
    monkeypatch, tmp_path, caplog, torch_version
):
    with_pair(monkeypatch, tmp_path, torch_version, "0.3.0")
    detect.check_host()
    assert not caplog.records


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("torch.distributed", "set_timeout"),
        ("torchtitan.models.common.moe", "RoutedExperts"),
        ("torchtitan.models.common.moe:GroupedExperts", "Config"),
    ],
)
def test_a_host_without_what_the_binding_needs_is_refused(owner, name, monkeypatch):
    detect.check_host()  # imports the host, with its device
    monkeypatch.delattr(pkgutil.resolve_name(owner), name)
    with pytest.raises(EzpzError) as error:
        detect.check_host()
    message = str(error.value)
    assert name in message
    for distribution in ("torch", "torchtitan"):
        assert f"{distribution} {metadata.version(distribution).partition('+')[0]}" in message
    assert f"Tested: {untested.tested_pairs()}." in message
    assert "pip install 'torch==2.15.0' 'torchtitan==0.3.0'" in message


class NoHost(Titan03):
    evidence = dataclasses.replace(Titan03.evidence, thing="no_such_host.train:main")


@pytest.fixture
def no_host(monkeypatch):
    """As where no generation of the host is installed."""
    monkeypatch.setattr(detect, "HOSTS", (NoHost(),))
    detect.host.cache_clear()
    yield
    detect.host.cache_clear()


def test_a_host_that_cannot_be_imported_says_why(no_host):
    with pytest.raises(EzpzError, match="No module named 'no_such_host'"):
        detect.check_host()


def test_a_host_that_is_not_installed_is_said_to_be_so(monkeypatch, tmp_path, no_host):
    with_pair(monkeypatch, tmp_path, None, None)
    with pytest.raises(EzpzError, match="torch not installed and torchtitan not installed"):
        detect.check_host()


def test_an_untested_pair_that_can_do_it_is_one_line_a_day(monkeypatch, tmp_path, caplog):
    for pair in (("9.1.0", "0.3.0"), ("9.1.0", "0.3.0"), ("2.15.0", "0.9.0"), ("9.1.0", "0.3.0")):
        with_pair(monkeypatch, tmp_path, *pair)
        detect.check_host()
    line = "ezpz_moe: torch {} with torchtitan {} is untested; `ezpz-moe verify` checks it here"
    assert caplog.messages == [line.format("9.1.0", "0.3.0"), line.format("2.15.0", "0.9.0")]


def test_the_next_day_an_untested_pair_is_said_again(monkeypatch, tmp_path):
    with_pair(monkeypatch, tmp_path, "9.1.0", "0.3.0")
    assert untested.notice()
    (stamp,) = (tmp_path / "untested").iterdir()
    stamp.rename(stamp.with_name("9.1.0-with-0.3.0.2026-01-31"))
    assert untested.notice()
    assert not untested.notice()
    assert [each.name for each in (tmp_path / "untested").iterdir()] == [stamp.name]


def test_where_nothing_can_be_kept_an_untested_pair_is_said_each_time(monkeypatch, tmp_path):
    with_pair(monkeypatch, tmp_path / "file", "9.1.0", "0.3.0")
    (tmp_path / "file").touch()
    assert untested.notice()
    assert untested.notice()


# --- one worker -------------------------------------------------------------------------------


def run_worker(monkeypatch, end: BaseException | None, local_rank: str) -> list:
    """What a worker does besides the host's module, which ends with ``end``."""
    events = []

    def run_module(module: str, **how) -> None:
        events.append((module, how))
        if end is not None:
            raise end

    monkeypatch.setattr(runpy, "run_module", run_module)
    monkeypatch.setattr(time, "sleep", lambda seconds: events.append("waited"))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv(allocator.VARIABLE, "0")  # this process has more tests to run
    try:
        ezpz_moe.train.main()
    except SystemExit as stop:
        events.append(stop.code)
    return events


HOST = ("torchtitan.train", {"run_name": "__main__", "alter_sys": True})


@pytest.mark.parametrize(
    ("end", "local_rank", "expected"),
    [
        (None, "1", [HOST]),
        (EzpzError("wrong"), "0", [HOST, 2]),
        (EzpzError("wrong"), "1", [HOST, "waited", 2]),
        (SystemExit(2), "1", [HOST, "waited", 2]),  # the host's own command line
        (SystemExit(1), "1", [HOST, 1]),
        (KeyboardInterrupt(), "1", [HOST, 130]),
    ],
)
def test_a_worker_runs_the_hosts_module_and_lets_rank_0_report(
    end, local_rank, expected, monkeypatch
):
    assert run_worker(monkeypatch, end, local_rank) == expected


WITH_A_HOST_THAT_ABORTS_THE_TEARDOWN = """
import atexit, os, runpy, sys
from ezpz_moe.hosts import detect

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

def host(*_, **__):
    sys.kept = Aborts()
    print("trained")
    atexit.register(print, "the host's own handler")

detect.check_host = lambda: None
run_module, runpy.run_module = runpy.run_module, host
run_module("ezpz_moe.train", run_name="__main__")
"""


def test_a_run_that_has_ended_well_is_not_lost_in_the_interpreters_teardown():
    """As by the threads of gloo."""
    result = subprocess.run(
        [sys.executable, "-c", WITH_A_HOST_THAT_ABORTS_THE_TEARDOWN],
        env={**os.environ, allocator.VARIABLE: "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "trained\nthe host's own handler\n"


# --- the launcher's choices -------------------------------------------------------------------


def test_a_wrong_number_of_processes_is_refused(monkeypatch, job):
    with pytest.raises(EzpzError, match="--nproc 0: must be at least 1 process"):
        launch.train(str(job), [], tell=print, nproc=0)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    with pytest.raises(EzpzError, match=r"--nproc 5: this machine has 4 xpu .* --nproc 4"):
        launch.train(str(job), [], tell=print, nproc=5)


@pytest.mark.parametrize(
    ("nproc", "chosen", "accelerator", "expected"),
    [
        (1, None, False, None),
        (2, None, False, "4"),
        (16, None, False, "1"),
        (2, "3", False, "3"),
        (2, None, True, None),
    ],
)
def test_threads_are_shared_out_on_the_cpu(nproc, chosen, accelerator, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    monkeypatch.setenv("OMP_NUM_THREADS", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    launch.share_threads(nproc)
    assert os.environ.get("OMP_NUM_THREADS") == expected


@pytest.mark.parametrize(
    ("log_rank", "degree", "nproc", "nnodes", "expected"),
    [
        (None, 1, 1, 1, "0"),
        (None, 1, 8, 1, "0"),
        (None, 2, 8, 1, "0,4"),
        (None, 4, 4, 1, "0,3"),
        ("2", 4, 4, 1, "0,2"),
        ("3,1", 1, 4, 1, "0,1,3"),
        ("", 2, 2, 1, "0,1"),
        (None, 2, 4, 2, "0"),  # of 8 ranks the 4th, which is local rank 0 of node 1
        (None, 4, 4, 2, "0,2"),  # the 6th
    ],
)
def test_rank_0_and_the_loss_are_shown(log_rank, degree, nproc, nnodes, expected, monkeypatch):
    monkeypatch.delenv("LOG_RANK", raising=False)
    if log_rank is not None:
        monkeypatch.setenv("LOG_RANK", log_rank)
    assert launch._shown_ranks(degree, nproc, nnodes) == expected


def test_the_trainer_is_told_which_ranks_of_all_machines_are_shown():
    assert launch._on_all_nodes("0,2", 4, 1) == "0,2"
    assert launch._on_all_nodes("0,2", 4, 3) == "0,2,4,6,8,10"


def test_a_wrong_log_rank_is_refused(monkeypatch):
    monkeypatch.setenv("LOG_RANK", "first")
    with pytest.raises(EzpzError, match="LOG_RANK='first'"):
        launch._shown_ranks(1, 2, 1)


# --- real processes ---------------------------------------------------------------------------


def test_a_mistake_in_the_job_costs_no_import_of_torch(job):
    job.write_text(job.read_text().replace("seq_len", "seq_length"))
    code = START.replace(
        "with exit_on_user_error():",
        "import atexit; atexit.register(lambda: print('torch' in sys.modules))\n"
        "with exit_on_user_error():",
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(job), "1"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert re.fullmatch(r"ezpz-moe: error: .*job\.toml.*seq_length.*seq_len.*\n", result.stderr)


@pytest.mark.train
def test_two_ranks_train_and_rank_0_is_shown_until_they_are_interrupted(job):
    """Ctrl-C ends the workers without tracebacks, and nothing is left behind."""
    process = start(job, 2, "--training.steps", "1000", python=sys.executable)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(r"step:\s+2\b", line):
            break
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2, lines
    process.send_signal(signal.SIGINT)
    code, rest, err = finish(process)
    assert code == 128 + signal.SIGINT
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert "Traceback" not in rest + err
    assert "stopped by SIGINT. Nothing was saved, because checkpoints are off" in err
    out = "".join(lines)
    assert re.findall(r"step:\s+(\d+)", out) == ["1", "2"]
    threads = max(1, torch.get_num_threads() // 2)
    assert f", {threads} thread" in out
    assert "[rank" not in out
    assert out.count("ezpz_moe: freed memory is kept") == 1
    memory = [float(gib) for gib in re.findall(r"memory:\s+([\d.]+)GiB", out)]
    assert len(memory) == 2
    assert all(0.3 < gib < 4 for gib in memory)
    assert list((job.parent / "scratch").glob("*ezpz*")) == []
    assert list((job.parent / "scratch").glob("torchelastic*")) == []


@pytest.mark.train
def test_a_pipelines_loss_is_shown_with_its_rank(job):
    """For as many steps as the flags after the job say, not the job."""
    pipeline = ("--parallelism.pipeline_parallel_degree", "2")
    code, out, err = run(job, 2, *pipeline, "--training.steps", "1")
    assert code == 0, err
    losses = {
        rank: float(loss) for rank, loss in re.findall(r"\[rank(\d)\].*loss:\s*(-?[\d.]+)", out)
    }
    assert losses["0"] == -1  # the host's mark for "not here"
    assert 6 < losses["1"] < 10
    assert set(re.findall(r"step:\s+(\d+)", out)) == {"1"}
    assert "loss is not visible" not in out


@pytest.mark.train
def test_a_mistake_that_the_workers_find_is_one_message(job):
    (job.parent / "empty.txt").write_text(" \n")
    job.write_text(job.read_text().replace("[training]", '[training]\ndataset_path = "empty.txt"'))
    code, out, err = run(job, 1)
    assert code == 2
    assert re.fullmatch(r"ezpz-moe: error: .*empty\.txt' contains no text\.\n", err)
    assert "Traceback" not in out
    assert not (job.parent / "outputs").exists()


ON_A_MACHINE_WHOSE_NAME_MEANS_NOTHING = f"""
import socket
socket.getfqdn = lambda *_: "no-such-host.invalid"
{START}
"""


@pytest.mark.train
def test_one_machine_needs_no_name(job):
    code, _, err = finish(start(job, 1, program=ON_A_MACHINE_WHOSE_NAME_MEANS_NOTHING))
    assert code == 0, err


@pytest.mark.train
def test_a_mistake_that_the_dataloader_finds_is_one_message(job):
    """One document for two ranks: found inside the trainer, which would search for ever."""
    (job.parent / "one.txt").write_text("one document")
    job.write_text(job.read_text().replace("[training]", '[training]\ndataset_path = "one.txt"'))
    code, out, err = run(job, 2)
    assert code == 2
    assert err.count("ezpz-moe: error:") == 1
    assert "1 document for 2 data-parallel ranks" in err
    assert "Traceback" not in out + err


@pytest.mark.train
def test_a_crash_of_the_trainer_is_reported_by_torchrun(job):
    code, _, err = run(job, 1, "--dump-folder", "/proc/not-a-folder")
    assert code == 1
    assert err.count("Root Cause (first observed failure)") == 1
    assert "FileNotFoundError" in err
