"""Checkpoints from strangers: nothing in them is run, and nothing is written beside the target."""

from __future__ import annotations

import collections
import fractions
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import THREE, trained
from damage_cases import COMMANDS, refusal, save, save_run
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorProperties,
)

from ezpz_moe.hosts.dcp import stand_ins, unpickling
from ezpz_moe.hosts.dcp.torch_kinds import TORCH
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.remapping import remap

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WRITTEN = Path(__file__).parent / "data" / "metadata"

RAN: list[str] = []


def run_me(what: str) -> str:
    """What no file may run; harmless, and it leaves a trace."""
    RAN.append(what)
    return what


class Trap:
    """Pickled as a call of :func:`run_me`."""

    def __reduce__(self):
        return run_me, ("run",)


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    yield
    ran = RAN.copy()
    RAN.clear()
    assert not ran


def change(folder: Path, **fields) -> None:
    """Replace fields of the metadata."""
    storage.write_metadata(folder, replace(storage.read_metadata(folder), **fields))


@pytest.fixture
def source(tmp_path) -> Path:
    return save_run(tmp_path / "step-7")


# What is not run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("payload", "name"),
    [(Trap(), "test_untrusted_files.run_me"), (collections.Counter(), "collections.Counter")],
)
def test_what_metadata_names_is_not_run(source, command, payload, name) -> None:
    change(source, planner_data={"a": (payload,)})
    said = refusal(COMMANDS[command], source)
    assert f"{source / '.metadata'}: names '{name}'" in said
    assert "do not resume" in said


def naming(module: str, name: str) -> bytes:
    """A pickle of what has this name."""
    texts = (b"\x8c" + bytes([len(each)]) + each.encode() for each in (module, name))
    return b"\x80\x04" + b"".join(texts) + b"\x93."


@pytest.mark.parametrize("kinds", [TORCH, stand_ins.STAND_INS], ids=["torch", "stand-ins"])
@pytest.mark.parametrize("module", ["os", "builtins", "torch", "pathlib", "torch.serialization"])
def test_a_known_module_is_not_a_known_name(module, kinds) -> None:
    for name in ("getcwd", "print", "load", "Path", "os", "Size.__new__", "float32\n\x1b[2J"):
        with pytest.raises(unpickling.Refused) as refused:
            unpickling.load_metadata(naming(module, name), kinds)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["train_state.step", f"optimizer.param_groups.{THREE[0]}.lr"])
def test_what_an_entry_names_is_not_run(tmp_path, name) -> None:
    """An object is stored as a pickle of its own: inspect reads the step, remap both lr."""
    state = trained()
    state["train_state"]["step"] = Trap() if "step" in name else 7
    if "lr" in name:
        state["optimizer"][name.removeprefix("optimizer.")] = Trap()
    dcp.save(state, checkpoint_id=tmp_path / "source")
    RAN.clear()  # DCP copies what it saves, and so runs it
    read = inspect if "step" in name else COMMANDS["remap"]
    said = refusal(read, tmp_path / "source")
    assert f"{tmp_path / 'source' / '__0_0.distcp'}, byte" in said
    assert "names 'test_untrusted_files.run_me', which is not run" in said


def test_entries_that_are_only_renamed_are_copied_unread(tmp_path) -> None:
    state = trained() | {"layers.1.note": fractions.Fraction(1, 3)}
    dcp.save(state, checkpoint_id=tmp_path / "source")
    remap(tmp_path / "source", tmp_path / "out", "0.2")
    folders = [tmp_path / "source", tmp_path / "out"]
    stored = []
    for folder in folders:
        place = storage.read_metadata(folder).storage_data[MetadataIndex("layers.1.note")]
        stored.append(b"".join(storage.blocks(folder, place)))
    assert stored[0] == stored[1]
    assert b"Fraction" in stored[0]


@pytest.mark.parametrize("payload", [Trap(), collections.Counter()])
def test_a_position_of_a_strangers_dataset_is_copied_unread_and_said(tmp_path, payload) -> None:
    pickled = pickle.dumps({"token_buffer": [1, 2], "more": payload})
    source = save(tmp_path / "source", dataloader={"dp_rank_0": pickled})
    (note,) = remap(source, tmp_path / "out", "0.2").notes
    assert "'test_untrusted_files.run_me'" in note or "'collections.Counter'" in note
    assert "--checkpoint.exclude_from_loading dataloader" in note
    place = storage.read_metadata(tmp_path / "out").storage_data
    assert storage.load(tmp_path / "out", place[MetadataIndex("dataloader.dp_rank_0")]) == pickled


def test_what_dcp_itself_writes_is_read_as_it_is(source) -> None:
    metadata = storage.read_metadata(source)
    assert isinstance(metadata.storage_meta.checkpoint_id, PurePosixPath)
    read_by_torch = pickle.loads((source / ".metadata").read_bytes())
    assert metadata.state_dict_metadata == read_by_torch.state_dict_metadata
    assert metadata.storage_data == read_by_torch.storage_data
    assert metadata.planner_data == read_by_torch.planner_data


@pytest.mark.parametrize("file", sorted(WRITTEN.glob("*.metadata")), ids=lambda file: file.stem)
def test_what_every_torch_writes_is_read(tmp_path, file) -> None:
    """Of two ranks, with shards, objects and a path; see write.py there."""
    (tmp_path / ".metadata").write_bytes(file.read_bytes())
    metadata = storage.read_metadata(tmp_path)
    w1 = metadata.state_dict_metadata[THREE[0]]
    assert [chunk.offsets[0] for chunk in w1.chunks] == [0, 2]
    assert metadata.state_dict_metadata["norm.weight"].properties.dtype is torch.bfloat16
    assert len({place.relative_path for place in metadata.storage_data.values()}) == 2
    # What remap writes of it, torch reads.
    storage.write_metadata(tmp_path, replace(metadata, storage_meta=None))
    rewritten = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert rewritten.state_dict_metadata == metadata.state_dict_metadata
    assert type(rewritten.state_dict_metadata[THREE[0]].properties) is TensorProperties


def test_there_is_a_file_of_every_minor_release_that_is_supported() -> None:
    minor = torch.__version__.rpartition(".")[0]
    assert list(WRITTEN.glob(f"torch-{minor}.*")), f"run {WRITTEN / 'write.py'} with this torch"


@pytest.mark.parametrize("file", sorted(WRITTEN.glob("*.metadata")), ids=lambda file: file.stem)
def test_a_file_that_the_installed_torch_cannot_read_is_not_resumed_from(tmp_path, file) -> None:
    """2.14 does not read what 2.15 saved, and its error says nothing of it; remap does."""
    (tmp_path / ".metadata").write_bytes(file.read_bytes())
    for place in storage.read_metadata(tmp_path).storage_data.values():
        (tmp_path / place.relative_path).write_bytes(bytes(10**5))
    try:
        pickle.loads(file.read_bytes())
    except ValueError:
        said = refusal(storage.check_metadata, tmp_path)
        assert f".metadata: torch {torch.__version__} cannot read it: " in said
        assert "Resume with the torch that saved it" in said
    else:
        storage.check_metadata(tmp_path)


# Files below the folder --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../evil", "/{}/evil", "a/../../evil", "", ".", "..", "C:evil", "..\\evil", "a\nb"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_outside_the_folder_is_refused(source, command, name) -> None:
    name = name.format(source.parent)
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = name
    storage.write_metadata(source, metadata)
    assert f"its file {name!r} is not in the checkpoint's folder" in refusal(
        COMMANDS[command], source
    )
    assert [each.name for each in source.parent.iterdir()] == ["step-7"]


def test_a_file_in_a_folder_below_is_allowed(source) -> None:
    metadata = storage.read_metadata(source)
    (source / "a").mkdir()
    (source / "__0_0.distcp").rename(source / "a" / "__0_0.distcp")
    places = {
        index: replace(place, relative_path="a/__0_0.distcp")
        for index, place in metadata.storage_data.items()
    }
    change(source, storage_data=places)
    remap(source, source.with_name("out"), "0.2")
    assert inspect(source.with_name("out")).files == 1
