"""``ezpz-moe tune``: one step of a job on two ranks measures, and a later run knows the fastest."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import fork_server
import pytest
from dialect import SINCE_2026_09

from ezpz_moe import cli
from ezpz_moe.compute.agreement import ALONE_VARIABLE
from ezpz_moe.compute.tuning import CACHE_VARIABLE, Measured, Question, Situation
from ezpz_moe.errors import EXIT_CODE
from ezpz_moe.tools.tune import tune

TINY = Path(__file__).parents[1] / "data" / "tiny"
GATE_AND_UP, DOWN = (8, 64, 128), (8, 64, 64)
PRODUCT, SIZES = ("mm", {GATE_AND_UP, DOWN}) if SINCE_2026_09 else ("routed", {(8, 64, 64)})
"""What a backend is asked for: grouped linears ask for one product after the other."""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The tests' job, saving checkpoints, with its experts left to ``auto``."""
    path = Path(shutil.copytree(TINY, tmp_path / "job")) / "job.toml"
    text = path.read_text().replace('"tiny_sdpa"', '"tiny_sdpa_auto"')
    path.write_text(text + "[checkpoint]\nenable = true\ninterval = 1\n")
    return path


def _run(job: Path, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [fork_server.python(), "-m", "ezpz_moe.cli", command, job.name, *flags],
        cwd=job.parent,
        env={**os.environ, "PYTHON_EXEC": fork_server.python()},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result


@pytest.mark.train
def test_tune_measures_the_jobs_own_step_and_its_runs_know(job, tmp_path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(cache))
    shown = _run(job, "tune", "--nproc", "2").stdout
    assert not (job.parent / "outputs").exists()  # neither checkpoints nor logs
    files = sorted((cache / "auto").iterdir())
    assert len(SIZES) <= len(files) <= 2 * len(SIZES)  # the ranks' loads may be of one class
    fastest, sizes = set(), set()
    for file in files:
        record = json.loads(file.read_text())
        sizes.add(tuple(record["question"]["sizes"]))
        assert record["rows"] == 1024  # 2 sequences of 128 tokens, 3 experts each: 768, rounded up
        assert set(record["milliseconds"]) == {"grouped_mm_fused", "for_loop", "batched_mm_padded"}
        first = next(iter(record["milliseconds"]))
        assert f"{first} {record['milliseconds'][first]:.3g} ms" in shown
        fastest.add(first)
    assert sizes == SIZES
    assert str(cache / "auto") in shown
    trained = _run(job, "train", "--nproc", "2", "--checkpoint.no-enable")
    said = [line for line in (trained.stdout + trained.stderr).splitlines() if ": auto:" in line]
    assert said
    assert not [line for line in said if "measured now" in line]
    assert any(f"auto: {name} for {PRODUCT}" in said[0] for name in fastest)
    assert sorted((cache / "auto").iterdir()) == files


def test_while_it_tunes_each_process_decides_alone(job, tmp_path, monkeypatch) -> None:
    """Or those that follow another would have to measure in the run."""
    seen = []

    def train(*arguments, **named) -> int:
        seen.append(os.environ.get(ALONE_VARIABLE))
        return 0

    monkeypatch.setattr("ezpz_moe.tools.tune.train", train)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert tune(str(job), [], tell=print) == (0, [])
    assert seen == ["1"]
    assert ALONE_VARIABLE not in os.environ


@pytest.fixture
def not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments, **named):
        raise AssertionError("a step was started")

    monkeypatch.setattr("ezpz_moe.tools.tune.train", train)


def _error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == EXIT_CODE
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("not_started")
def test_a_job_whose_backend_is_chosen_already_is_refused(job, capsys) -> None:
    job.write_text(job.read_text().replace("_auto", "_for_loop"))
    said = _error(capsys, "tune", str(job))
    assert f"{job}: compute_backend = 'for_loop' in flavor tiny_sdpa_for_loop" in said
    assert "Name a flavor that ends in _auto" in said


@pytest.mark.usefixtures("not_started")
@pytest.mark.parametrize("by_flag", [False, True])
def test_a_job_that_does_not_choose_by_time_is_refused(job, capsys, by_flag: bool) -> None:
    flags = ["--debug.deterministic"] if by_flag else []
    if not by_flag:
        job.write_text(job.read_text().replace("[debug]", "[debug]\ndeterministic = true"))
    said = _error(capsys, "tune", str(job), *flags)
    assert f"{job}: debug.deterministic = true: auto then takes the first usable backend" in said


@pytest.mark.usefixtures("not_started")
def test_a_cache_that_cannot_be_written_is_told_before_anything_starts(
    job, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    said = _error(capsys, "tune", str(job))
    assert str(tmp_path / "file") in said
    assert f"Set {CACHE_VARIABLE} to another folder" in said


def test_a_dtype_that_this_cpu_emulates_is_told(job, monkeypatch, capsys, cpu_with) -> None:
    """As of a flavor that asks for bfloat16 where jobs would train in float32."""
    cpu_with("float32")
    question = Question("mm", ("for_loop",), "cpu", "bfloat16", (8, 64, 64), recompute=False)
    measured = [(Situation(question, rows=1024, skew=0), Measured({"for_loop": 1.0}))]
    monkeypatch.setattr("ezpz_moe.tools.tune.tune", lambda *arguments, **named: (0, measured))
    assert cli.main(["tune", str(job)]) == 0
    assert "bfloat16 is emulated on this CPU" in " ".join(capsys.readouterr().out.split())
