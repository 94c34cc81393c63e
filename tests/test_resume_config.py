"""What a run saves last, and what `ezpz-moe doctor` says of what a job resumes from."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from config_cases import config, conflict

from ezpz_moe import cli
from ezpz_moe.config.routing_schema import Balance, Router
from ezpz_moe.hosts.detect import check_host, host

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.config import ConfigManager  # noqa: E402

from ezpz_moe.hosts.titan import checkpointer, resuming  # noqa: E402
from ezpz_moe.hosts.titan.resuming import whole_steps  # noqa: E402
from ezpz_moe.tools.checkpoints.expert_order import read_order, write_order  # noqa: E402

SCRIPTS = Path(__file__).parent.parent / "scripts"
JOB = """
[model]
name = "ezpz_moe"
flavor = "debugmodel_sdpa"
[job]
dump_folder = "{folder}"
[checkpoint]
enable = true
[optimizer]
lr = 0.001
[lr_scheduler]
warmup_steps = 10
[training]
steps = {steps}
"""


@pytest.fixture
def job(tmp_path) -> Path:
    return write_job(tmp_path, steps=100)


def write_job(folder: Path, *, steps: int) -> Path:
    path = folder / "job.toml"
    path.write_text(JOB.format(folder=folder, steps=steps))
    return path


def checkpoint_of(path: Path, *flags: str):
    """The checkpointer's config of a job after the trainer's own flags."""
    return (
        ConfigManager()
        .parse_args(["--module", "ezpz_moe", "--config", str(path), *flags])
        .checkpoint
    )


# The table ----------------------------------------------------------------------------------------


def test_the_table_has_tried_every_key_of_the_tables(monkeypatch):
    """Whoever adds a key to a flavor's table tries to resume with it, and writes the result."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    changes = importlib.import_module("make_resume_table").CHANGES
    named = "".join(change.what for section in changes.values() for change in section)
    fields = Router.model_fields | Balance.model_fields
    keys = {field.alias or name for name, field in fields.items()}
    assert {key for key in keys if f"`{key}`" not in named} == set()
    text = (SCRIPTS.parent / "docs" / "guides" / "checkpoints.md").read_text()
    rows = re.findall(
        r"^\| .* \| (.*) \| (?:resumes|resumes, with a note|\*\*refused\*\*) \|", text, re.M
    )
    assert rows == [change.what for section in changes.values() for change in section]


# What is saved last -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "is_model_only"),
    [
        ([], False),
        (["--checkpoint.last-save-model-only"], True),
        (["--checkpoint.last-save-in-hf"], True),
        (["--checkpoint.create-seed-checkpoint"], True),
        (["--checkpoint.interval", "7"], False),
    ],
)
def test_the_last_checkpoint_is_whole_unless_a_flag_says_otherwise(job, flags, is_model_only):
    assert checkpoint_of(job, *flags).last_save_model_only is is_model_only


def test_a_job_may_say_what_its_last_checkpoint_is():
    assert config(**{"checkpoint.last_save_model_only": True}).checkpoint.last_save_model_only
    assert config(**{"checkpoint.last_save_in_hf": True}).checkpoint.last_save_model_only
    said = conflict(
        **{"checkpoint.last_save_in_hf": True, "checkpoint.last_save_model_only": False}
    )
    assert "last_save_in_hf requires last_save_model_only=True" in said


def test_no_field_of_our_own_is_a_setting(job):
    (setting,) = (
        each
        for each in host().settings(config())
        if each.path.startswith("checkpoint.") and each.changed
    )
    assert setting.path == "checkpoint.last_save_model_only"
    assert not {"metrics.model", "metrics.job"} & {each.path for each in host().settings(config())}


# The steps of a folder ----------------------------------------------------------------------------


def test_only_what_can_be_resumed_is_whole(tmp_path):
    """Neither the model alone nor damaged metadata, also when a full disk has ended the run."""
    save_run(tmp_path, steps=2, rate=0.1)
    save_run(tmp_path, steps=4, rate=None)
    damaged = save_run(tmp_path, steps=6, rate=0.1) / ".metadata"
    damaged.write_bytes(damaged.read_bytes()[:100])
    shutil.copytree(tmp_path / "checkpoint" / "step-2", tmp_path / "checkpoint" / "step-8.bak")
    assert list(whole_steps(tmp_path / "checkpoint")) == [2]


def test_bytes_that_are_no_checkpoint_are_one_line(tmp_path, monkeypatch, capsys):
    """As zeros after a power cut: lengths are right, and only loading finds it, under any door."""
    save_run(tmp_path, steps=2, rate=0.1)
    newest = save_run(tmp_path, steps=4, rate=0.1)
    file = newest / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    monkeypatch.setattr(resuming, "what_fits", lambda states, _: states)
    manager, states = object.__new__(checkpointer.Checkpointer), {"lm_head.weight": torch.zeros(2)}
    manager.folder = str(newest.parent)
    with pytest.raises(SystemExit):
        manager.dcp_load(states, str(newest), False, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"ezpz-moe: error: {newest}: cannot be loaded: its bytes are not what torch saved. Copy "
        "the checkpoint again, or resume from another step: --checkpoint.load_step 2."
    )


@pytest.mark.parametrize("order", [{1: [1, 0]}, {}])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_way_back_to_the_first_numbers_goes_along(tmp_path, monkeypatch, order):
    """Into every later step, by the first rank alone, and before the step looks complete."""
    placed = save_run(tmp_path, steps=2, rate=None)
    write_order(placed, order)
    monkeypatch.setattr(resuming, "what_fits", lambda states, _: states)
    manager, model = object.__new__(checkpointer.Checkpointer), torch.nn.Linear(2, 1, bias=False)
    manager.folder, manager.states = str(placed.parent), {}
    manager.dcp_load({"lm_head.weight": torch.zeros(2)}, str(placed), False, False)
    manager.states, ranks, seen = {checkpointer.MODEL: model}, iter([0, 1]), []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: next(ranks))
    monkeypatch.setattr(
        checkpointer.CheckpointManager,
        "dcp_save",
        lambda self, states, folder, **how: seen.append(read_order(Path(folder))),
    )
    for name in ("step-4", "step-6"):
        manager.dcp_save({}, checkpoint_id=str(tmp_path / name), async_mode="disabled")
    assert seen == [order, {}]


# doctor -------------------------------------------------------------------------------------------


def save_run(folder: Path, *, steps: int, rate: float | None) -> Path:
    """Write a checkpoint with a run's step and learning rate, or of the model alone."""
    states = {"lm_head.weight": torch.zeros(2)}
    if rate is not None:
        states |= {
            "train_state": {"step": steps},
            "optimizer": {"param_groups.lm_head.weight.lr": rate},
        }
    path = folder / "checkpoint" / f"step-{steps}"
    dcp.save(states, checkpoint_id=path, no_dist=True)
    return path


def doctor(capsys, job: Path) -> tuple[int, str]:
    code = cli.main(["doctor", str(job)])
    return code, " ".join(capsys.readouterr().out.split())


def test_doctor_says_both_learning_rates(capsys, tmp_path):
    """After 60 of 100 steps, 10 of them warmup; the rate falls linearly from 0.001."""
    checkpoint = save_run(tmp_path, steps=60, rate=0.001 * 40 / 90)
    code, said = doctor(capsys, write_job(tmp_path, steps=100))
    assert code == 0
    assert "at step 61" in said
    assert "the learning rate of step" not in said
    code, said = doctor(capsys, write_job(tmp_path, steps=200))
    assert code == 0
    assert f"note {checkpoint}: the learning rate of step 61 is 0.000444444 in the run" in said
    assert "and 0.000736842 in this job's schedule" in said


def test_doctor_says_that_a_job_ends_before_its_checkpoint(capsys, tmp_path):
    """Seven steps of warmup leave none to decay in, and the host asserts that there are some."""
    checkpoint = save_run(tmp_path, steps=60, rate=0.001)
    code, said = doctor(capsys, write_job(tmp_path, steps=7))
    assert code == 1
    assert f"BROKEN checkpoint: {checkpoint}: is of step 60, and training.steps is 7" in said
    job = write_job(tmp_path, steps=7)
    excluded = 'enable = true\nexclude_from_loading = ["train_state"]'
    job.write_text(job.read_text().replace("enable = true", excluded))
    code, said = doctor(capsys, job)
    assert code == 0, said
    assert "at step 1 " in said


def test_doctor_says_that_a_checkpoint_cannot_be_resumed(capsys, tmp_path, job):
    checkpoint = save_run(tmp_path, steps=60, rate=None)
    code, said = doctor(capsys, job)
    assert code == 1
    assert f"BROKEN {checkpoint}: it holds the model alone" in said


def test_doctor_says_that_a_step_which_the_job_names_is_not_there(capsys, tmp_path, job):
    save_run(tmp_path, steps=60, rate=0.1)
    job.write_text(job.read_text().replace("enable = true", "enable = true\nload_step = 50"))
    code, said = doctor(capsys, job)
    assert code == 1
    assert f"BROKEN checkpoint: {tmp_path}/checkpoint/step-50: there is no such folder." in said


def test_doctor_knows_that_a_run_begins_with_a_seed(capsys, tmp_path, job):
    """Which is the model alone, as `ckpt remap` makes it of safetensors."""
    seed = save_run(tmp_path, steps=0, rate=None)
    code, said = doctor(capsys, job)
    assert code == 0, said
    assert f"{seed}" in said
    assert "at step 1" in said


def test_doctor_says_that_a_checkpoint_is_damaged(capsys, tmp_path, job):
    (save_run(tmp_path, steps=60, rate=0.1) / ".metadata").write_bytes(b"")
    code, said = doctor(capsys, job)
    assert code == 1
    assert "BROKEN checkpoint: " in said
    assert ".metadata: cannot be read" in said
