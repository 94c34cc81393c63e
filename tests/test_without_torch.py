"""A checkpoint that is read without torch: the answer is the one that torch's classes give."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from damage_cases import mutations, save, save_run

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp import metadata as by_torch
from ezpz_moe.hosts.dcp import stand_ins
from ezpz_moe.tools.checkpoints import data_files
from ezpz_moe.tools.checkpoints.contents import inspect

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WRITTEN = Path(__file__).parent / "data" / "metadata"
NOT_READ = {"read_metadata": stand_ins, "whole_number": data_files}


def test_the_sizes_of_dtypes_are_those_of_torch() -> None:
    for name, size in stand_ins._ITEM_SIZES.items():
        dtype = getattr(torch, name)
        assert (str(stand_ins.DType(name, size)), size) == (str(dtype), dtype.itemsize)


STATE = ("a dtype", "strided", False, stand_ins.MemoryFormat.CONTIGUOUS, False)
STRANGE = [STATE[:4], (*STATE, (), ()), (*STATE[:3], 0, False), (*STATE[:3], None, False), ()]


def test_strange_properties_are_left_to_torch() -> None:
    """It would refuse them."""
    for usual in (STATE, (*STATE, (4, 1))):
        stand_ins.Properties().__setstate__(usual)
    for state in STRANGE:
        with pytest.raises(ValueError, match=r"no properties|to unpack"):
            stand_ins.Properties().__setstate__(state)


def told(metadata) -> dict:
    """What a checkpoint's metadata says, whatever its classes are."""
    tensors = {
        name: (
            str(entry.properties.dtype),
            list(entry.size),
            entry.size.numel(),
            [(list(chunk.offsets), list(chunk.sizes)) for chunk in entry.chunks],
        )
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "chunks")
    }
    places = {
        (index.fqn, index.offset and tuple(index.offset)): asdict(place)
        for index, place in metadata.storage_data.items()
    }
    return {
        "names": list(metadata.state_dict_metadata),
        "tensors": tensors,
        "places": places,
        "paths": metadata.planner_data,
    }


@pytest.mark.parametrize("file", sorted(WRITTEN.glob("*.metadata")), ids=lambda file: file.stem)
def test_the_metadata_of_every_torch_is_read_the_same(tmp_path, file) -> None:
    (tmp_path / ".metadata").write_bytes(file.read_bytes())
    assert told(stand_ins.read_metadata(tmp_path)) == told(by_torch.read_metadata(tmp_path))


def inspected(folder: Path) -> str:
    """What ``inspect`` says."""
    try:
        return repr(inspect(folder))
    except EzpzError as error:
        return str(error)


def by_either(folder: Path, monkeypatch) -> tuple[str, str]:
    """What ``inspect`` says without torch as far as it goes, and with torch alone."""
    first = inspected(folder)
    with monkeypatch.context() as patched:
        for name, module in NOT_READ.items():
            patched.setattr(module, name, lambda *_: None)
        return first, inspected(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_run(tmp_path / "step-7")


MANY = [(150, 3), pytest.param(2000, 4, marks=pytest.mark.full)]


@pytest.mark.parametrize(("number", "seed"), MANY)
def test_damaged_metadata_is_told_alike(folder, number, seed, monkeypatch) -> None:
    file = folder / ".metadata"
    for damaged in mutations(file.read_bytes(), number=number, seed=seed):
        file.write_bytes(damaged)
        without_torch, with_torch = by_either(folder, monkeypatch)
        assert without_torch == with_torch


@pytest.mark.parametrize(("number", "seed"), MANY)
def test_a_damaged_step_is_told_alike_or_is_the_step(folder, number, seed, monkeypatch) -> None:
    """Damage to the archive around it, which torch does not forgive, leaves its checksum."""
    whole, _ = by_either(folder, monkeypatch)
    assert "step=7" in whole
    place = next(
        place
        for index, place in by_torch.read_metadata(folder).storage_data.items()
        if index.fqn == "train_state.step"
    )
    file, end = folder / place.relative_path, place.offset + place.length
    data = file.read_bytes()
    refused = 0
    for damaged in mutations(data[place.offset : end], number=number, seed=seed):
        entry = damaged[: place.length].ljust(place.length, b"\0")
        file.write_bytes(data[: place.offset] + entry + data[end:])
        without_torch, with_torch = by_either(folder, monkeypatch)
        assert without_torch in (with_torch, whole)
        refused += without_torch != whole
    assert refused > number / 10


@pytest.mark.parametrize("step", [torch.tensor(7, dtype=torch.int32), 7.0, True, 2**70])
def test_a_step_of_another_kind_is_left_to_torch(tmp_path, step, monkeypatch) -> None:
    folder = save(tmp_path / "source", train_state={"step": step})
    first, second = by_either(folder, monkeypatch)
    assert first == second
    assert f"step={int(step)}" in first
