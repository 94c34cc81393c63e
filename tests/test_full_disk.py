"""A disk that is full, for a process that may write no more than some bytes to a file.

The kernel refuses it as a full disk does, in the middle of a write, and root too.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import THREE, trained
from dialect import ON_0_2, job
from safetensors.torch import save_file
from telemetry_cases import layer, record
from trainer_runs import LOG, job_folder, train

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.json_lines import append, read
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.remapping import remap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes.

    What is imported meanwhile leaves no bytecode: Python 3.11 does not see that it was cut off, and
    every later process would fail to read it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes_none = sys.dont_write_bytecode
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_none
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Remapping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name"), [("0.2", "moe.experts.w1"), ("2026_09", "moe.routed_experts.w13.weight")]
)
def test_remap_to_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, to, name) -> None:
    """0.2 gets copies of what is stored; for w13 torch writes new entries.

    Of a tensor that is larger than a file's buffer torch hides the reason.
    """
    shapes = [(5, 60, 400), (5, 400, 60), (5, 60, 400)]
    dcp.save(trained(dict(zip(THREE, shapes, strict=True))), checkpoint_id=tmp_path / "source")
    remap(tmp_path / "source", tmp_path / "whole", to)
    places = storage.read_metadata(tmp_path / "whole").storage_data
    place = next(each for index, each in places.items() if index.fqn == f"layers.1.{name}")
    with room_for(place.offset + place.length // 2), pytest.raises(EzpzError) as error:
        remap(tmp_path / "source", tmp_path / "target", to)
    assert str(error.value).startswith(f"{tmp_path / 'target'} was not written: ")
    assert str(error.value).endswith(": File too large.")
    assert {each.name for each in tmp_path.iterdir()} == {"source", "whole"}


def test_safetensors_on_a_full_disk_are_one_line_and_nothing_is_left(tmp_path) -> None:
    """The library has an error of its own for it."""
    with (
        room_for(1000),
        pytest.raises(EzpzError) as error,
        atomic_folder(tmp_path / "target", source=tmp_path / "source", needed=0) as partial,
    ):
        save_file({"a": torch.ones(1000)}, partial / "model.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'target'} was not written: ")
    assert "File too large" in str(error.value)
    assert not list(tmp_path.iterdir())


# The kernel's own folder takes nothing, and of nobody.
READ_ONLY = Path("/sys/ezpz_moe")


def test_remap_to_a_read_only_folder_is_one_line(tmp_path) -> None:
    dcp.save(trained(), checkpoint_id=tmp_path / "source")
    with pytest.raises(EzpzError) as error:
        remap(tmp_path / "source", READ_ONLY / "target", "0.2")
    assert str(error.value).startswith(f"{READ_ONLY / 'target'} was not written: {READ_ONLY}: ")


# Telemetry ---------------------------------------------------------------------------------------


def warnings(caplog) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_lines_that_cannot_be_written_are_said_once_and_the_next_are_written(
    tmp_path, caplog
) -> None:
    path = tmp_path / "telemetry.jsonl"
    append(path, record(layer([3, 4]), step=10))
    size = path.stat().st_size
    with room_for(size + size // 2):
        append(path, record(layer([3, 4]), step=20))
        append(path, record(layer([3, 4]), step=30))
    (said,) = warnings(caplog)
    assert f"{path}: cannot be written: File too large. The run goes on" in said
    assert "step 20" in said
    assert path.stat().st_size > size, "the disk took a part of the line"
    append(path, record(layer([3, 4]), step=40))
    assert [each.step for each in read(path)] == [10, 40]
    with room_for(size):
        append(path, record(layer([3, 4]), step=50))
    assert "step 50" in warnings(caplog)[-1], "another failure is said again"


def test_lines_for_a_read_only_folder_are_said_once(caplog) -> None:
    for step in (10, 20):
        append(READ_ONLY / "telemetry.jsonl", record(layer([3, 4]), step=step))
    (said,) = warnings(caplog)
    assert f"{READ_ONLY / 'telemetry.jsonl'}: cannot be written: " in said


@pytest.mark.train
@pytest.mark.skipif(ON_0_2, reason="[telemetry] needs torchtitan 0.3 or later")
def test_a_run_goes_on_without_its_telemetry(tmp_path) -> None:
    folder = job_folder(tmp_path)
    (folder / "watched.toml").write_text('inherits = "tiny"\n[telemetry]\nevery = 1\n')
    text = (folder / "job.toml").read_text().replace('"tiny_sdpa"', '"watched_sdpa"')
    (folder / "job.toml").write_text(text)
    (folder / "run").mkdir()
    (folder / "run" / "telemetry.jsonl").symlink_to("/dev/full")
    flags = ("--training.steps", "2")
    ((of_rank,),) = train({"run": job(folder / "job.toml", *flags)}, folder, ranks=1).values()
    assert len(of_rank["losses"]) == 2
    log = (folder / LOG).read_text()
    assert log.count("telemetry.jsonl: cannot be written: No space left on device") == 1
