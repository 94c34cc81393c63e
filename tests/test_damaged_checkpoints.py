"""Damage of any kind to a DCP checkpoint is one line, and no value is taken for another."""

from __future__ import annotations

import contextlib
import pickle
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import EXPERTS, THREE
from damage_cases import COMMANDS, mutations, refusal, save, save_run
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp import unpickling
from ezpz_moe.hosts.dcp.structure import covers
from ezpz_moe.hosts.dcp.torch_kinds import TORCH
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.contents import inspect
from ezpz_moe.tools.checkpoints.data_files import check_data
from ezpz_moe.tools.checkpoints.remapping import remap
from ezpz_moe.tools.checkpoints.tensors import read_whole, write_checkpoint
from ezpz_moe.tools.upcycling.dense import DenseCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


@pytest.fixture(autouse=True)
def _memory_is_limited() -> Iterator[None]:
    """A mistake in what is tested here could take all of the machine's, and end other processes."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def source(tmp_path) -> Path:
    return save_run(tmp_path / "step-7")


def said_by(command: Callable, folder: Path) -> str:
    """What a command refuses with; nothing if it does its work."""
    try:
        command(folder)
    except EzpzError as error:
        return str(error)
    return ""


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
            check_data(source, after)
            for name in values.keys() & after.state_dict_metadata.keys():
                assert storage.same_bits(read_whole(source, after, name), values[name]), name
        shutil.rmtree(out, ignore_errors=True)
    assert refused > number, "of twice that number: most damage breaks a pickle"


def test_a_reference_to_the_two_billionth_object_takes_no_memory() -> None:
    """Python would make room for all of them: 32 GB."""
    bomb = pickle.dumps("a")[:-2] + b"r\xff\xff\xff\x7f."
    with pytest.raises(pickle.UnpicklingError, match="unexpected byte at 14"):
        unpickling.load_metadata(bomb, TORCH)


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
