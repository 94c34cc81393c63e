"""``ezpz-moe train --dry-run`` says what would run and starts nothing; ``--help-trainer``."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import save

from ezpz_moe import cli
from ezpz_moe.hosts.ranks import degrees
from ezpz_moe.tools import launch

JOB = str(Path(__file__).parent.parent / "flavors" / "jobs" / "debug_cpu.toml")
MODEL = '[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n'


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch, tmp_path) -> None:
    def start(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(launch, "run_ranks", start)
    monkeypatch.setattr(launch, "meet", start)
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)
    for variable in ("LOG_RANK", "OMP_NUM_THREADS"):  # the launcher sets them for its workers
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


def plan(capsys, *arguments: str) -> tuple[int, dict[str, str], str]:
    """The exit code, the table of the run, and everything that was said."""
    code = cli.main(["train", *arguments, "--dry-run"])
    said = capsys.readouterr().out
    table = said.partition("Settings that are not")[0]
    rows = (line.strip().split("  ", 1) for line in table.splitlines()[1:] if line.strip())
    return code, {row[0]: row[1].strip() for row in rows}, said


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *arguments])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_would_run(capsys, cpu_with) -> None:
    cpu_with("float32")
    flags = ["--training.steps", "5", "--checkpoint.enable", "--checkpoint.interval", "2"]
    code, run, said = plan(capsys, JOB, "--nproc", "2", *flags)
    assert code == 0
    assert run["job"] == f"{JOB} and the command line"
    assert run["model"] == ("debugmodel_sdpa_for_loop: 33.0 M parameters, 28.1 M of them active")
    assert run["experts"].startswith("for_loop (one torch.mm per expert")
    assert run["device"].startswith("cpu: ")
    assert 'mixed_precision_param = "float32", experts in float32' in run["precision"]
    assert run["ranks"] == "2 on this machine: data_parallel_shard 2"
    assert run["memory"].startswith("0.2 GiB of model states on each of 2 rank(s)")
    assert run["memory"].endswith("shared by 2 ranks")
    assert run["steps"] == "1 to 5"
    assert run["checkpoints"] == "every 2 steps to outputs/debug_cpu/checkpoint"
    assert run["begins with"] == "initial values"
    assert "\n  training.steps = 5 (default: 10000)\n" in said
    command = next(line for line in said.splitlines() if line.startswith("torchrun "))
    assert "--nproc-per-node 2" in command
    assert command.endswith(" ".join([JOB, *flags]))
    assert said.endswith("Nothing was started. Leave out --dry-run to train.\n")
    assert list(Path().iterdir()) == []


def test_one_machine_of_several(capsys) -> None:
    place = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "node0"]
    code, run, said = plan(capsys, "debugmodel_sdpa_for_loop", "--nproc", "2", *place)
    assert code == 0
    assert run["job"] == "flavor debugmodel_sdpa_for_loop"
    assert run["ranks"] == (
        "6, 2 on each of 3 machines, of which this is number 1: data_parallel_shard 6"
    )
    assert "--node_rank 1 --master_addr node0" in said


def test_a_run_that_would_be_refused_is_refused(capsys, tmp_path) -> None:
    (tmp_path / "job.toml").write_text(f"{MODEL}[parallelism]\ntensor_parallel_degree = 4\n")
    assert "6 ranks do not fit the degrees" in refusal(
        capsys, "job.toml", "--nproc", "6", "--dry-run"
    )
    said = refusal(
        capsys, "job.toml", "--nproc", "4", "--dry-run", "--parallelism.tensor-parallel-degree", "3"
    )
    assert "job.toml and the command line: parallelism.tensor_parallel_degree = 3 does" in said
    flags = ["--checkpoint.enable", "--checkpoint.load_step", "7"]
    assert "step-7" in refusal(capsys, "job.toml", "--nproc", "4", "--dry-run", *flags)


def test_where_it_would_resume(capsys, tmp_path) -> None:
    folder = tmp_path / "outputs" / "checkpoint"
    flags = ["--checkpoint.enable", "--dump_folder", "outputs", "--training.steps"]
    save({"tok_embeddings.weight": torch.ones(1)}, checkpoint_id=folder / "step-7", no_dist=True)
    said = refusal(capsys, "debugmodel_sdpa_for_loop", *flags, "9", "--dry-run")
    assert "step-7: holds the model alone, so no run can resume from it" in said
    save({"train_state.step": torch.tensor(8)}, checkpoint_id=folder / "step-8", no_dist=True)
    _, run, _ = plan(capsys, "debugmodel_sdpa_for_loop", *flags, "9")
    assert run["steps"] == "9 to 9"
    _, run, _ = plan(capsys, "debugmodel_sdpa_for_loop", *flags, "8")
    assert run["steps"] == "none: the checkpoint is of step 8, and training.steps is 8"
    said = refusal(capsys, "debugmodel_sdpa_for_loop", *flags, "7", "--dry-run")
    assert "step-8: is of step 8, and training.steps is 7" in said


def test_a_model_that_the_device_cannot_hold(capsys) -> None:
    code, _, said = plan(capsys, "671B_sdpa_for_loop")
    assert code == 1
    assert "The model states are larger than the device." in said


def test_the_host_remarks(capsys, tmp_path) -> None:
    (tmp_path / "own.toml").write_text('inherits = "debugmodel"\n[balance]\naux_loss = 0.01\n')
    (tmp_path / "job.toml").write_text(MODEL.replace("debugmodel", "own"))
    code, _, said = plan(capsys, "job.toml")
    assert code == 0
    assert "\nnote: " in said


def test_a_job_is_named_first(capsys) -> None:
    assert "train: name a flavor or a job" in refusal(capsys)
    Path("my").mkdir()
    Path("my/job.toml").write_text(MODEL)
    for slip in ("my/job", "my/job.tml", "my/jbo"):
        assert f"{slip}: is no flavor, and the path" in refusal(capsys, slip)
        assert "Did you mean 'my/job.toml'?" in refusal(capsys, slip)
    assert "'none/job' is a path. A flavor is a name" in refusal(capsys, "none/job")
    assert "a.toml b.toml: name one flavor or job" in refusal(capsys, "a.toml", "b.toml")


@pytest.mark.parametrize(
    ("given", "ranks", "expected"),
    [
        ({}, 1, {}),
        ({}, 8, {"data_parallel_shard": 8}),
        ({"tensor_parallel": 2}, 8, {"data_parallel_shard": 4, "tensor_parallel": 2}),
        ({"data_parallel_shard": 1, "pipeline_parallel": 4}, 4, {"pipeline_parallel": 4}),
        (
            {"data_parallel_replicate": 2, "expert_parallel": 4},
            8,
            {"data_parallel_replicate": 2, "data_parallel_shard": 4, "expert_parallel": 4},
        ),
    ],
)
def test_the_degrees_of_a_run(given, ranks, expected) -> None:
    names = ("pipeline", "context", "tensor", "expert")
    all_ = {f"{name}_parallel": 1 for name in names} | {"data_parallel_replicate": 1}
    values = all_ | {"data_parallel_shard": -1} | given
    par = SimpleNamespace(**{f"{name}_degree": value for name, value in values.items()})
    assert degrees(par, ranks) == expected


def test_the_trainers_flags_are_listed(capsys) -> None:
    assert cli.main(["train", "--help-trainer"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--training.steps INT How many train steps to run (default: 10000)" in lines
    assert any(line.startswith("activation-checkpoint:full --activation") for line in lines)
