"""What the trainer will be told: flags win over the job, and the job over the host's defaults."""

from pathlib import Path

import pytest

from ezpz_moe.config.job import Job
from ezpz_moe.tools.trainer_settings import checkpoint_settings, pipeline_degree


@pytest.mark.parametrize(
    ("values", "flags", "expected"),
    [
        ({}, [], 1),
        ({"parallelism.pipeline_parallel_degree": 2}, ["--training.steps", "3"], 2),
        (
            {"parallelism.pipeline_parallel_degree": 2},
            ["--parallelism.pipeline_parallel_degree", "4"],
            4,
        ),
        ({}, ["--parallelism.pipeline-parallel-degree=4"], 4),
    ],
)
def test_the_pipeline_degree(values, flags, expected):
    assert pipeline_degree(Job(flavor="x", values=values), flags) == expected


@pytest.fixture(autouse=True)
def _checkpoints(tmp_path, monkeypatch):
    """Three in each of two places. Whole are those of the steps 5 and 10.

    Beside them are whole copies under other names.
    """
    monkeypatch.chdir(tmp_path)
    for folder in ("outputs/checkpoint", "other/mine"):
        for step, whole in (
            ("5", True),
            ("10", True),
            ("20", False),
            ("20.partial", True),  # a `ckpt remap` is writing it
            ("20.bak", True),
        ):
            checkpoint = tmp_path / folder / f"step-{step}"
            checkpoint.mkdir(parents=True)
            if whole:
                (checkpoint / ".metadata").touch()


ON = {"checkpoint.enable": True}
ELSEWHERE = {"job.dump_folder": "other", "checkpoint.folder": "mine"}


@pytest.mark.parametrize(
    ("values", "flags", "expected"),
    [
        ({}, [], "outputs/checkpoint/step-10"),
        (ELSEWHERE, [], "other/mine/step-10"),
        ({"job.dump_folder": "empty"}, [], "empty/checkpoint/step-None"),
        ({}, ["--dump-folder", "other", "--checkpoint.folder=mine"], "other/mine/step-10"),
        ({}, ["--job.dump_folder", "other", "--checkpoint.folder", "mine"], "other/mine/step-10"),
        (ELSEWHERE, ["--dump_folder", "outputs"], "outputs/mine/step-None"),
    ],
)
def test_the_newest_checkpoint_that_is_complete(values, flags, expected):
    settings = checkpoint_settings(Job(flavor="x", values=values), flags)
    assert settings.folder / f"step-{settings.newest()}" == Path(expected)


@pytest.mark.parametrize(
    ("values", "flags", "expected"),
    [
        ({}, [], (False, False, None)),
        (ON, [], (True, True, None)),
        (ON, ["--checkpoint.no-enable"], (False, False, None)),
        ({}, ["--checkpoint.enable"], (True, True, None)),
        (ON | {"checkpoint.load_only": True}, [], (True, False, None)),
        (ON, ["--checkpoint.load-only"], (True, False, None)),
        (ON, ["--checkpoint.load_only", "--checkpoint.no-load-only"], (True, True, None)),
        (ON | {"checkpoint.load_step": 7}, [], (True, True, 7)),
        (ON, ["--checkpoint.load_step", "5"], (True, True, 5)),
        (ON, ["--checkpoint.load-step=0"], (True, True, 0)),
        (ON, ["--checkpoint.load-step=5"], (True, True, 5)),
        (ON | {"checkpoint.load_step": 5}, ["--checkpoint.load_step", "-1"], (True, True, None)),
        ({"checkpoint.load_step": 5}, [], (False, False, 5)),
    ],
)
def test_what_is_loaded_and_whether_any_is_written(values, flags, expected):
    settings = checkpoint_settings(Job(flavor="x", values=values), flags)
    assert expected == (settings.is_enabled, settings.is_saving, settings.load_step)


def test_the_hosts_defaults_are_where_we_look():
    from ezpz_moe.hosts.detect import check_host

    check_host()
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.trainer import Trainer

    checkpoint, trainer = CheckpointManager.Config(), Trainer.Config()
    where = Path(trainer.dump_folder, checkpoint.folder)
    assert (checkpoint.enable, where) == (False, Path("outputs/checkpoint"))
    assert checkpoint.load_step == -1


@pytest.mark.parametrize(
    ("values", "flags", "loads_step"),
    [
        ({}, [], True),
        ({"checkpoint.exclude_from_loading": ["dataloader", "train_state"]}, [], False),
        ({}, ["--checkpoint.exclude-from-loading", "lr_scheduler", "train_state"], False),
        (
            {"checkpoint.exclude_from_loading": ["train_state"]},
            ["--checkpoint.exclude_from_loading", "dataloader", "--training.steps", "3"],
            True,
        ),
    ],
)
def test_a_run_that_does_not_load_its_step_begins_at_the_first(values, flags, loads_step):
    assert checkpoint_settings(Job(flavor="x", values=values), flags).loads_step is loads_step
