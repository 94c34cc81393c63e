"""Which entry of a checkpoint becomes which under another generation's names. Reads no data.

Main stacks w1 and w3, [E, F, D] each, into w13 [E, 2, F, D]. A DCP tensor is a set of boxes, so
that every stored shard of w1 becomes a shard of w13 by itself, and no two have to be in memory at
once. The optimizer's moments are stacked like their weights; what else it keeps of a parameter, a
count of steps or a rate, is one for both and has to be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ezpz_moe.checkpoints.names import MAIN, Renamed, renaming
from ezpz_moe.errors import EzpzError

Convert = Callable[[Any], Any]
Entry: TypeAlias = TensorStorageMetadata | BytesStorageMetadata

_STACKED = 1
"""The dimension of w13 on which w1 and w3 lie."""


@dataclass(frozen=True)
class Step:
    """A stored entry of the source, and an entry that it becomes.

    Attributes:
        convert: makes the new tensor or object of the old one; None keeps the stored bytes.
    """

    source: MetadataIndex
    target: MetadataIndex
    convert: Convert | None = None


@dataclass
class Plan:
    """The way to another generation's names.

    Attributes:
        entries: the new metadata of every tensor and object.
        paths: where each stands in the trainer's nested state.
        steps: for every stored entry of the source at least one.
        changed: how many names of the source are others in the target.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    paths: dict[str, tuple] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    changed: int = 0


def make_plan(metadata: Metadata, source: str, target: str) -> Plan:
    """The plan from generation ``source`` to ``target``.

    Raises:
        EzpzError: a parameter whose new name is not known; w1 and w3 of different shapes.
    """
    entries: Mapping[str, Entry] = metadata.state_dict_metadata
    rename = renaming(entries, source, target)
    plan = Plan()
    for name, entry in entries.items():
        new = rename(name)
        plan.changed += any(each.name != name for each in new)
        for each in new:
            reshaped = _reshaped(entry, each, target)
            plan.entries[each.name] = _joined(each.name, plan.entries.get(each.name), reshaped)
    for name, path in (metadata.planner_data or {}).items():
        for place, each in enumerate(rename(name)):
            plan.paths[each.name] = tuple(_part(rename(p), place) for p in path)
    shards = {
        (name, chunk.offsets): chunk
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for index in metadata.storage_data:
        for each in rename(index.fqn):
            if _is_stacked(entries[index.fqn], each, target):
                plan.steps += _shard_steps(index, shards[index.fqn, index.offset], each, target)
            else:
                # What is one for both w1 and w3 is compared with the other's, value by value.
                convert = None if each.half is None else _unchanged
                plan.steps.append(Step(index, replace(index, fqn=each.name), convert))
    return plan


def _part(new: tuple[Renamed, ...], place: int) -> Any:
    """Of the one or two names of a part of a path, that of the place."""
    return new[min(place, len(new) - 1)].name


def _is_stacked(entry: Entry, new: Renamed, target: str) -> bool:
    """Whether it has the shape of the experts' weights: the weights and the optimizer's moments."""
    dimensions = 3 if target == MAIN else 4
    return (
        new.half is not None
        and isinstance(entry, TensorStorageMetadata)
        and len(entry.size) == dimensions
    )


def _reshaped(entry: Entry, new: Renamed, target: str) -> Entry:
    if not _is_stacked(entry, new, target):
        return entry
    assert isinstance(entry, TensorStorageMetadata)
    assert new.half is not None
    return _stacked(entry, new.half) if target == MAIN else _taken(entry, new.half)


def _shard_steps(
    index: MetadataIndex, shard: ChunkStorageMetadata, new: Renamed, target: str
) -> Iterator[Step]:
    assert new.half is not None
    if target == MAIN:
        box = _stacked_chunk(shard, new.half)
        yield Step(index, MetadataIndex(new.name, box.offsets), _stack)
    elif (place := _place(shard, new.half)) is not None:
        box = _taken_chunk(shard)
        yield Step(index, MetadataIndex(new.name, box.offsets), _take(place))


# The two ways: a tensor of main out of one, [E, F, D] -> [E, 1 of 2, F, D], and back -------------


def _stacked(entry: TensorStorageMetadata, half: int) -> TensorStorageMetadata:
    size = _with(entry.size, 2)
    return _resized(entry, size, [_stacked_chunk(chunk, half) for chunk in entry.chunks])


def _taken(entry: TensorStorageMetadata, half: int) -> TensorStorageMetadata:
    chunks = [_taken_chunk(each) for each in entry.chunks if _place(each, half) is not None]
    return _resized(entry, _without(entry.size), chunks)


def _stacked_chunk(chunk: ChunkStorageMetadata, half: int) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(_with(chunk.offsets, half), _with(chunk.sizes, 1))


def _taken_chunk(chunk: ChunkStorageMetadata) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(_without(chunk.offsets), _without(chunk.sizes))


def _place(chunk: ChunkStorageMetadata, half: int) -> int | None:
    """Where in a shard of w13 this half is; None if the shard has only the other."""
    place = half - chunk.offsets[_STACKED]
    return place if 0 <= place < chunk.sizes[_STACKED] else None


def _stack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.unsqueeze(_STACKED)


def _take(place: int) -> Convert:
    # A copy: saving a view would save all that it is a view of.
    return lambda tensor: tensor.select(_STACKED, place).clone(
        memory_format=torch.contiguous_format
    )


def _unchanged(value: Any) -> Any:
    return value


def _with(size: torch.Size, value: int) -> torch.Size:
    return torch.Size((*size[:_STACKED], value, *size[_STACKED:]))


def _without(size: torch.Size) -> torch.Size:
    return torch.Size((*size[:_STACKED], *size[_STACKED + 1 :]))


def _resized(
    entry: TensorStorageMetadata, size: torch.Size, chunks: list[ChunkStorageMetadata]
) -> TensorStorageMetadata:
    # Older torch has no strides in it.
    strides = getattr(entry.properties, "strides", None)
    properties = entry.properties
    if strides is not None:
        properties = replace(properties, strides=torch.empty(size, device="meta").stride())
    return TensorStorageMetadata(properties, size, chunks)


def _joined(name: str, before: Entry | None, entry: Entry) -> Entry:
    """The metadata of what two entries of the source become together."""
    if before is None or before == entry:
        return entry
    if (
        not isinstance(before, TensorStorageMetadata)
        or not isinstance(entry, TensorStorageMetadata)
        or (before.size, before.properties) != (entry.size, entry.properties)
    ):
        raise EzpzError(f"{name}: w1 and w3, which it stacks, differ in shape or dtype.")
    return replace(before, chunks=[*before.chunks, *entry.chunks])
