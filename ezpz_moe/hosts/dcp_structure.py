"""Check what a checkpoint's metadata says for itself, before any of it is believed.

Damage that still unpickles would otherwise show up much later, or not at all: as memory that nobody
wrote, or as a file outside the checkpoint's folder.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)


def check_structure(metadata: Any) -> None:
    """Check that ``metadata`` describes whole tensors, in files below the checkpoint's folder.

    Raises:
        ValueError: it does not.
        Exception: of another class, if an attribute is missing or has the wrong type.
    """
    _require(isinstance(metadata, Metadata), "is not the metadata of a checkpoint")
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    paths = metadata.planner_data
    _require(isinstance(entries, dict) and isinstance(places, dict), "has no list of entries")
    _require(paths is None or isinstance(paths, dict), "has no places in the trainer's state")
    for name, path in (paths or {}).items():
        is_path = isinstance(path, tuple) and all(isinstance(part, str | int) for part in path)
        _require(isinstance(name, str) and is_path, f"{name!r}: has no place in the state")
    for index, place in places.items():
        _check_place(index, place)
    described: set[MetadataIndex] = set()
    for name, entry in entries.items():
        # Messages name entries, and may not hold what a terminal acts on.
        _require(isinstance(name, str) and name.isprintable(), f"{name!r}: is not a name")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(name, entry, places)
            described |= {MetadataIndex(name, chunk.offsets) for chunk in entry.chunks}
        else:
            _require(isinstance(entry, BytesStorageMetadata), f"{name!r}: is of an unknown kind")
            _require(MetadataIndex(name) in places, f"{name!r}: is not stored anywhere")
            described.add(MetadataIndex(name))
    if strange := places.keys() - described:
        raise ValueError(f"{next(iter(strange)).fqn!r}: is stored, but is not described")


def is_below(name: str) -> bool:
    """Return whether a file's name, from a stranger, is a plain path below the folder it is in."""
    # By the rules of both systems: a checkpoint may come from the other one.
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    is_absolute = PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).anchor)
    return bool(parts) and not is_absolute and ".." not in parts and name.isprintable()


def covers(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Return whether the chunks cover a tensor of ``size``, each of its elements once.

    A box is a sum of its corners with alternating signs (of its indicator function, this is the
    mixed derivative). So boxes make up a larger one if, and only if, their corners add up to its.
    """
    if len(chunks) == 1 and not any(chunks[0].offsets):
        return chunks[0].sizes == size
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, offsets, sizes in (
        (-1, [0] * len(size), size),
        *((1, chunk.offsets, chunk.sizes) for chunk in chunks),
    ):
        edges = [((o, 1), (o + s, -1)) for o, s in zip(offsets, sizes, strict=True)]
        for corner in itertools.product(*edges):
            number = sign
            for _, side in corner:
                number *= side
            corners[tuple(place for place, _ in corner)] += number
    return not any(corners.values())


def _check_place(index: Any, place: Any) -> None:
    _require(isinstance(index, MetadataIndex) and isinstance(index.fqn, str), "has no entry's name")
    _require(isinstance(place, _StorageInfo), f"{index.fqn!r}: is not stored anywhere")
    path, numbers = place.relative_path, (place.offset, place.length)
    if not (isinstance(path, str) and is_below(path)):
        raise ValueError(f"{index.fqn!r}: its file {path!r} is not in the checkpoint's folder")
    _require(
        all(type(each) is int and each >= 0 for each in numbers),
        f"{index.fqn!r}: begins or ends nowhere",
    )


def _check_tensor(name: str, entry: TensorStorageMetadata, places: dict) -> None:
    dtype, size, chunks = entry.properties.dtype, entry.size, entry.chunks
    boxes = [size, *(each for chunk in chunks for each in (chunk.offsets, chunk.sizes))]
    _require(isinstance(dtype, torch.dtype), f"{name!r}: has no dtype")
    _require(
        all(isinstance(box, torch.Size) and min(box, default=0) >= 0 for box in boxes),
        f"{name!r}: has no shape",
    )
    _require(
        all(isinstance(chunk, ChunkStorageMetadata) for chunk in chunks) and covers(size, chunks),
        f"{name!r}: its shards do not make up a tensor of {list(size)}",
    )
    for chunk in chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise ValueError(f"{name!r}: a shard is not stored anywhere")
        # torch.save compresses nothing, and adds a few hundred bytes.
        _require(
            bool(place.transform_descriptors)
            or place.length >= math.prod(chunk.sizes) * dtype.itemsize,
            f"{name!r}: has fewer bytes than a shard of {list(chunk.sizes)} needs",
        )


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
