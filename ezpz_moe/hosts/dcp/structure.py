"""Check what a checkpoint's metadata says for itself, before any of it is believed.

Damage that still unpickles would otherwise show up much later, or not at all: as memory that nobody
wrote, or as a file outside the checkpoint's folder.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Protocol

from ezpz_moe.hosts.dcp.kinds import Kinds


class Box(Protocol):
    """A shard's place in its tensor, as DCP's ``ChunkStorageMetadata`` has it."""

    @property
    def offsets(self) -> Sequence[int]: ...
    @property
    def sizes(self) -> Sequence[int]: ...


def check_structure(metadata: Any, kinds: Kinds) -> None:
    """Check that ``metadata`` describes whole tensors, in files below the checkpoint's folder.

    Args:
        metadata: what a pickle held.
        kinds: the classes with which it was read.

    Raises:
        ValueError: it does not.
        Exception: of another class, if an attribute is missing or has the wrong type.
    """
    _require(isinstance(metadata, kinds.metadata), "is not the metadata of a checkpoint")
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    paths = metadata.planner_data
    _require(isinstance(entries, dict) and isinstance(places, dict), "has no list of entries")
    _require(paths is None or isinstance(paths, dict), "has no places in the trainer's state")
    for name, path in (paths or {}).items():
        is_path = isinstance(path, tuple) and all(isinstance(part, str | int) for part in path)
        _require(isinstance(name, str) and is_path, f"{name!r}: has no place in the state")
    for index, place in places.items():
        _check_place(index, place, kinds)
    described: set[Any] = set()
    for name, entry in entries.items():
        # Messages name entries, and may not hold what a terminal acts on.
        _require(isinstance(name, str) and name.isprintable(), f"{name!r}: is not a name")
        if isinstance(entry, kinds.tensor):
            described |= _check_tensor(name, entry, places, kinds)
        else:
            _require(isinstance(entry, kinds.bytes), f"{name!r}: is of an unknown kind")
            _require(kinds.index(name) in places, f"{name!r}: is not stored anywhere")
            described.add(kinds.index(name))
    if strange := places.keys() - described:
        raise ValueError(f"{next(iter(strange)).fqn!r}: is stored, but is not described")


@cache  # a checkpoint has thousands of shards in a few files
def is_below(name: str) -> bool:
    """Return whether a file's name, from a stranger, is a plain path below the folder it is in."""
    # By the rules of both systems: a checkpoint may come from the other one.
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    is_absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return bool(parts) and not is_absolute and ".." not in parts and name.isprintable()


def covers(size: Sequence[int], chunks: Sequence[Box]) -> bool:
    """Return whether the chunks cover a tensor of ``size``, each of its elements once.

    A box is a sum of its corners with alternating signs (of its indicator function, this is the
    mixed derivative). So boxes make up a larger one if, and only if, their corners add up to its.
    """
    if any(len(box) != len(size) for chunk in chunks for box in (chunk.offsets, chunk.sizes)):
        return False
    # Dimensions in which no chunk is cut make no difference, and most are of that kind.
    dims = [
        dim
        for dim, whole in enumerate(size)
        if any(chunk.offsets[dim] or chunk.sizes[dim] != whole for chunk in chunks)
    ]
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, offsets, sizes in (
        (-1, [0] * len(size), size),
        *((1, chunk.offsets, chunk.sizes) for chunk in chunks),
    ):
        ends = [(offsets[dim], offsets[dim] + sizes[dim]) for dim in dims]
        for sides in itertools.product((0, 1), repeat=len(dims)):
            corner = tuple(end[side] for end, side in zip(ends, sides, strict=True))
            corners[corner] += -sign if sum(sides) % 2 else sign
    return not any(corners.values())


def _check_place(index: Any, place: Any, kinds: Kinds) -> None:
    is_named = isinstance(index, kinds.index) and isinstance(index.fqn, str)
    _require(is_named, "something without a name is stored")
    _require(isinstance(place, kinds.place), "an entry is stored in an unknown way")
    path, begin, length = place.relative_path, place.offset, place.length
    if not (isinstance(path, str) and is_below(path)):
        raise ValueError(f"{index.fqn!r}: its file {path!r} is not in the checkpoint's folder")
    if not (type(begin) is int and type(length) is int and begin >= 0 and length >= 0):
        raise ValueError(f"{index.fqn!r}: begins or ends nowhere")


def _check_tensor(name: str, entry: Any, places: Mapping[Any, Any], kinds: Kinds) -> set[Any]:
    """Check a tensor, and return where its shards are."""
    dtype, size, chunks = entry.properties.dtype, entry.size, entry.chunks
    boxes = [size, *(each for chunk in chunks for each in (chunk.offsets, chunk.sizes))]
    _require(isinstance(dtype, kinds.dtype), f"{name!r}: has no dtype")
    _require(
        all(isinstance(box, kinds.size) and min(box, default=0) >= 0 for box in boxes),
        f"{name!r}: has no shape",
    )
    _require(
        all(isinstance(chunk, kinds.chunk) for chunk in chunks) and covers(size, chunks),
        f"{name!r}: its shards do not make up a tensor of {list(size)}",
    )
    shards = {kinds.index(name, chunk.offsets): chunk for chunk in chunks}
    for index, chunk in shards.items():
        place = places.get(index)
        if place is None:
            raise ValueError(f"{name!r}: a shard is not stored anywhere")
        # torch.save compresses nothing, and adds a few hundred bytes.
        needed = math.prod(chunk.sizes) * dtype.itemsize
        if place.length < needed and not place.transform_descriptors:
            raise ValueError(f"{name!r}: has fewer bytes than a shard of {list(chunk.sizes)} needs")
    return set(shards)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
