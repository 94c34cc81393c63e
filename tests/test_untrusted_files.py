"""Checkpoints from strangers: nothing in them is run, and damage of any kind is one line."""

from __future__ import annotations

import collections
import contextlib
import fractions
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import EXPERTS, THREE, trained
from damage_cases import mutations
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import dcp_unpickling
from ezpz_moe.hosts.dcp_structure import covers
from ezpz_moe.tools.analysis import record
from ezpz_moe.tools.checkpoints import inspect, remap, storage
from ezpz_moe.tools.checkpoints.tensors import read_whole, write_checkpoint
from ezpz_moe.tools.upcycling.dense import DenseCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

WRITTEN = Path(__file__).parent / "data" / "metadata"

COMMANDS: dict[str, Callable] = {
    "inspect": inspect,
    "remap": lambda folder: remap(folder, folder.with_name("out"), "2026_09"),
    "upcycle": lambda folder: DenseCheckpoint(folder, SimpleNamespace(generation="0.3")),
    "analyze": lambda folder: record._load(folder, torch.nn.Linear(1, 1)),
    "train": storage.check_metadata,
}
"""What reads a checkpoint, before it asks for anything of the model."""

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


def save(folder: Path, **more) -> Path:
    dcp.save(trained() | more, checkpoint_id=folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A run's checkpoint with all that is converted; tests copy it."""
    position = {"inputs_buffer": [1], "labels_buffer": [2], "positions_buffer": [0]}
    state = trained()
    names = [name for name in state["optimizer"] if name.endswith(".lr")]
    state["optimizer"] |= {name.replace(".lr", ".initial_lr"): 1e-3 for name in names}
    state["lr_scheduler"] = {"last_epoch": 7}
    state["dataloader"] = {"dp_rank_0": pickle.dumps({"dataset_state": position}), "world_size": 1}
    folder = tmp_path_factory.mktemp("original") / "step-7"
    dcp.save(state, checkpoint_id=folder)
    return folder


@pytest.fixture
def source(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "step-7"))


def refusal(call: Callable, *arguments) -> str:
    with pytest.raises(EzpzError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def said_by(command: Callable, folder: Path) -> str:
    """What a command refuses with; nothing if it does its work."""
    try:
        command(folder)
    except EzpzError as error:
        return str(error)
    return ""


def change(folder: Path, **fields) -> None:
    """Replace fields of the metadata."""
    storage.write_metadata(folder, replace(storage.read_metadata(folder), **fields))


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


@pytest.mark.parametrize("module", ["os", "builtins", "torch", "pathlib", "torch.serialization"])
def test_a_known_module_is_not_a_known_name(module) -> None:
    for name in ("getcwd", "print", "load", "Path", "os", "Size.__new__", "float32\n\x1b[2J"):
        with pytest.raises(dcp_unpickling.Refused) as refused:
            dcp_unpickling.load_metadata(naming(module, name))
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


# Damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "seed"), [(50, 1), pytest.param(500, 2, marks=pytest.mark.full)]
)
def test_damaged_metadata_is_one_line_or_the_same_values(source, number, seed) -> None:
    before = storage.read_metadata(source)
    values = {
        name: read_whole(source, before, name)
        for name in (*THREE, "layers.1.moe.router.gate.weight")
    }
    out, refused = source.with_name("out"), 0
    commands = (inspect, COMMANDS["remap"])
    for damaged, command in product(
        mutations((source / ".metadata").read_bytes(), number=number, seed=seed), commands
    ):
        (source / ".metadata").write_bytes(damaged)
        said = said_by(command, source)
        assert not said or (str(source) in said and "\n" not in said)
        refused += bool(said)
        with contextlib.suppress(EzpzError):
            after = storage.read_metadata(source)
            storage.check_data(source, after)
            for name in values.keys() & after.state_dict_metadata.keys():
                assert storage.same_bits(read_whole(source, after, name), values[name]), name
        shutil.rmtree(out, ignore_errors=True)
    assert refused > number, "of twice that number: most damage breaks a pickle"


def test_a_reference_to_the_two_billionth_object_takes_no_memory() -> None:
    """Python would make room for all of them: 32 GB."""
    bomb = pickle.dumps("a")[:-2] + b"r\xff\xff\xff\x7f."
    with pytest.raises(pickle.UnpicklingError, match="LONG_BINPUT"):
        dcp_unpickling.load_metadata(bomb)


def _of_w1(metadata: Metadata):
    return metadata.state_dict_metadata[THREE[0]]


def _without_place(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex(THREE[0], torch.Size((0, 0, 0)))]


def _two_in_one_place(metadata: Metadata) -> None:
    first, second = (MetadataIndex(name, torch.Size((0, 0, 0))) for name in THREE[:2])
    metadata.storage_data[first] = metadata.storage_data[second]


def _too_few_bytes(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex(THREE[0], torch.Size((0, 0, 0)))].length = 100


def _one_more(metadata: Metadata) -> None:
    place = next(iter(metadata.storage_data.values()))
    metadata.storage_data[MetadataIndex(THREE[0], torch.Size((1, 0, 0)))] = place


def _resize(metadata: Metadata, size: torch.Size) -> None:
    entry = _of_w1(metadata)
    entry.size = size
    entry.chunks[0].sizes = size


DAMAGE: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "smaller": (lambda m: setattr(_of_w1(m), "size", torch.Size((4, 6, 4))), "do not make up"),
    "huge": (lambda m: _resize(m, torch.Size((2**40, 6, 4))), "has fewer bytes than"),
    "beyond int64": (lambda m: _resize(m, torch.Size((2**32, 2**32, 4))), "has fewer bytes than"),
    "negative": (lambda m: setattr(_of_w1(m), "size", torch.Size((-5, 6, 4))), "has no shape"),
    "hole": (lambda m: _of_w1(m).chunks.clear(), "do not make up"),
    "no dtype": (lambda m: setattr(_of_w1(m).properties, "dtype", "float32"), "has no dtype"),
    "another dtype": (
        lambda m: [
            setattr(m.state_dict_metadata[name].properties, "dtype", torch.int32) for name in THREE
        ],
        "does not hold the torch.int32 [5, 6, 4] that .metadata describes",
    ),
    "no place": (_without_place, "a shard is not stored anywhere"),
    "one place": (_two_in_one_place, "two entries overlap"),
    "few bytes": (_too_few_bytes, "has fewer bytes than"),
    "not described": (_one_more, "is stored, but is not described"),
    "no paths": (lambda m: setattr(m, "planner_data", [1]), "places in the trainer's state"),
    "bad path": (lambda m: setattr(m, "planner_data", {"a": ({},)}), "has no place in the state"),
    "no entries": (lambda m: setattr(m, "state_dict_metadata", None), "has no list of entries"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_metadata_that_contradicts_itself_is_refused(source, damage) -> None:
    alter, expected = DAMAGE[damage]
    metadata = pickle.loads((source / ".metadata").read_bytes())
    alter(metadata)
    storage.write_metadata(source, metadata)
    assert expected in refusal(COMMANDS["remap"], source)
    assert [each.name for each in source.parent.iterdir()] == ["step-7"]


def test_metadata_of_something_else_is_refused(source) -> None:
    (source / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert "is not the metadata of a checkpoint" in refusal(inspect, source)
    (source / ".metadata").write_bytes(b"")
    assert ".metadata: cannot be read: " in refusal(inspect, source)


def test_boxes_cover_a_tensor_if_each_element_is_in_one() -> None:
    """Compared with counting, on all pairs of boxes of a small tensor and some more."""
    size = (2, 3)
    intervals = [[(o, s) for o in range(n + 1) for s in range(n + 2 - o)] for n in size]
    boxes = [
        ChunkStorageMetadata(torch.Size((a[0], b[0])), torch.Size((a[1], b[1])))
        for a, b in product(*intervals)
    ]

    def counted(chunks) -> bool:
        grid = torch.zeros(5, 6)
        for box in chunks:
            (a, b), (m, n) = box.offsets, box.sizes
            grid[a : a + m, b : b + n] += 1
        expected = torch.zeros(5, 6)
        expected[:2, :3] = 1
        return torch.equal(grid, expected)

    chosen = [[], *([box] for box in boxes), *map(list, product(boxes[::2], boxes))]
    assert sum(map(counted, chosen)) > 20
    for chunks in chosen:
        assert covers(torch.Size(size), chunks) is counted(chunks), chunks
    assert covers(torch.Size(()), [ChunkStorageMetadata(torch.Size(()), torch.Size(()))])
    assert not covers(torch.Size(()), [])


def test_links_and_folders_in_a_files_place_are_said(source, tmp_path) -> None:
    data = source / "__0_0.distcp"
    content = data.read_bytes()
    data.unlink()
    data.symlink_to(tmp_path / "gone")
    assert f"{data}: is missing" in refusal(inspect, source)
    data.unlink()
    data.mkdir()
    assert f"{data}: is missing" in refusal(inspect, source)
    data.rmdir()
    data.write_bytes(content[:-1])
    assert f"{data}: is truncated" in refusal(inspect, source)
    data.write_bytes(content)
    (source / "stray.distcp").symlink_to(tmp_path / "gone")
    assert inspect(source).files == 1, "what the checkpoint does not name is not of it"


def test_a_name_that_a_terminal_would_act_on_is_refused(tmp_path) -> None:
    source = save(tmp_path / "source", **{"a\nb": torch.ones(1)})
    assert r"'a\nb': is not a name" in refusal(inspect, source)


def test_a_step_that_is_not_a_number_is_said(tmp_path) -> None:
    source = save(tmp_path / "source", train_state={"step": "seven"})
    assert "train_state.step is not a number" in refusal(inspect, source)


def test_a_rate_that_is_not_a_number_is_said(tmp_path) -> None:
    source = save(tmp_path / "source", lr_scheduler={"last_epoch": [7]})
    assert "lr_scheduler.last_epoch is not a number" in refusal(
        remap, source, tmp_path / "out", "0.2"
    )


@pytest.mark.parametrize("pickled", [b"no pickle", pickle.dumps({"inputs_buffer": [1]}), 3])
def test_a_position_that_is_none_is_said(tmp_path, pickled) -> None:
    source = save(tmp_path / "source", dataloader={"dp_rank_0": pickled})
    said = refusal(remap, source, tmp_path / "out", "0.2")
    assert "__0_0.distcp: dataloader.dp_rank_0" in said
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_places_in_a_list_keep_their_numbers(tmp_path) -> None:
    """DCP flattens a list that holds a tensor; its places are numbers, which have no new name."""
    source = save(tmp_path / "source", more={"list": [torch.ones(2), torch.zeros(3)]})
    remap(source, tmp_path / "out", "0.2")
    paths = storage.read_metadata(tmp_path / "out").planner_data
    assert paths["more.list.1"] == ("more", "list", 1)


def test_a_checkpoint_of_nothing_is_not_dense(tmp_path) -> None:
    write_checkpoint(tmp_path, [])
    dense = DenseCheckpoint(tmp_path, SimpleNamespace(generation="0.3"))
    assert dense.shape(f"{EXPERTS}.w1_EFD") is None
