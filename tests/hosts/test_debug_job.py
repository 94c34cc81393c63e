"""The job that everybody tries first: doctor holds, and the host's own command trains it."""

import os
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from dialect import batch, job
from trainer_runs import TORCHRUN

from ezpz_moe import cli

JOB = Path(__file__).parents[2] / "flavors" / "jobs" / "debug_cpu.toml"


def test_doctor_finds_nothing_broken(capsys):
    assert cli.main(["doctor", str(JOB), "--world-size", "1"]) == 0
    assert " 0 broken" in capsys.readouterr().out


@pytest.mark.train
@pytest.mark.parametrize(("module", "steps"), [("torchtitan.train", 1), ("ezpz_moe.train", 8)])
def test_the_debug_job_trains_by_the_hosts_command_and_by_ours(module, steps, tmp_path):
    """Without an accelerator the host's own command starts again as ours."""
    flags = [*batch(size=2, seq_len=128), "--training.steps", str(steps)]
    flags += ["--lr_scheduler.warmup_steps", "2", "--metrics.disable_color_printing"]
    forked = module == "ezpz_moe.train"  # the other has to import the host by itself
    python = fork_server.python() if forked else sys.executable
    result = subprocess.run(
        [python, *TORCHRUN, "-m", module, *job(JOB, *flags)],
        cwd=tmp_path,
        env={**os.environ, "PYTHON_EXEC": python},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    lines = [line for line in output.splitlines() if "step:" in line]
    # torchtitan takes an A100's peak for a CPU's; 0.2 has no way to leave the figure out.
    assert all(line.split("mfu:")[1].strip() in ("N/A", "nan%") for line in lines)
    losses = [float(line.partition("loss:")[2].split()[0]) for line in lines]
    assert len(losses) == steps
    assert losses[0] > 7.5  # log(2048) = 7.6: nothing is learnt yet
    assert steps == 1 or losses[-1] < losses[0] - 0.7
    said = [line for line in output.splitlines() if "ezpz_moe: compute_backend" in line]
    assert len(said) == 1
    assert "compute_backend for_loop" in said[0]
    assert "for 5 MoE layers; asked for by flavor" in said[0]
