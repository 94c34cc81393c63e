"""Which entry of a checkpoint becomes which under another generation's names. Reads no data.

Since September 2026, w1 and w3 are one tensor, w13 (:mod:`.layouts`). The optimizer's moments
follow their weights. Whatever else it keeps for a parameter, such as a step count or a rate, exists
once for both and has to be equal.

A plan is made in three passes over the checkpoint's metadata, each by an entry's new names: what
the entries will be (:func:`_new_entries`), where they are in the trainer's state
(:func:`_new_paths`), and what is done with each stored piece (:func:`_steps`). An entry with a
:class:`Layout` changes its shape with its generation; all others are only renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.structure import covers
from ezpz_moe.tools.checkpoints.layouts import Layout
from ezpz_moe.tools.checkpoints.names import (
    TITAN_2026_09,
    Renamed,
    Renaming,
    experts_of_0_3_alone,
    renaming,
)

Convert = Callable[[Any], Any]
Entry: TypeAlias = TensorStorageMetadata | BytesStorageMetadata
Place: TypeAlias = tuple[Any, ...]
"""Where an entry is in the trainer's nested state: keys and indices."""


@dataclass(frozen=True)
class Step:
    """A stored entry of the source, and an entry that it becomes.

    Attributes:
        convert: turns the old tensor or object into the new one; None keeps the stored bytes.
        shard: the old tensor's dtype and shape; None for an object.
    """

    source: MetadataIndex
    target: MetadataIndex
    convert: Convert | None = None
    shard: tuple[torch.dtype, torch.Size] | None = None


@dataclass(frozen=True)
class RemapPlan:
    """How to get to another generation's names.

    Attributes:
        entries: the new metadata of every tensor and object.
        paths: where each belongs in the trainer's nested state.
        steps: at least one for every stored entry of the source.
        changed: how many of the source's names change.
    """

    entries: dict[str, Entry]
    paths: dict[str, Place]
    steps: list[Step]
    changed: int


def make_plan(metadata: Metadata, source: str, target: str) -> RemapPlan:
    """Plan the way from generation ``source`` to ``target``.

    Raises:
        EzpzError: a shard has no counterpart in the target; w1 and w3 have different shapes; the
            experts have biases or no gate.
    """
    entries: Mapping[str, Entry] = metadata.state_dict_metadata
    if source != target and (name := experts_of_0_3_alone(entries)):
        raise EzpzError(
            f"{name}: experts with biases or without a gate are in torchtitan 0.3 alone, so "
            f"{target} could not load them. Leave the checkpoint as it is."
        )
    rename = renaming(entries, source, target)
    return RemapPlan(
        entries=_new_entries(entries, rename, target),
        paths=_new_paths(metadata.planner_data or {}, rename),
        steps=list(_steps(metadata, rename, target)),
        changed=sum(any(new.name != name for new in rename(name)) for name in entries),
    )


def _new_entries(entries: Mapping[str, Entry], rename: Renaming, target: str) -> dict[str, Entry]:
    """Return each entry under its new names, in its new shape; two of them may become one."""
    made: dict[str, Entry] = {}
    for name, entry in entries.items():
        for new in rename(name):
            reshaped = _reshaped(name, entry, new, target)
            made[new.name] = _joined(new.name, made.get(new.name), reshaped)
    # DCP would not notice: it compares sizes, and leaves what no shard covers as it was.
    for name, entry in made.items():
        if isinstance(entry, TensorStorageMetadata) and not covers(entry.size, entry.chunks):
            raise EzpzError(
                f"{name}: it stacks w1 and w3, but the checkpoint has only one of them."
            )
    return made


def _new_paths(
    paths: Mapping[str, tuple[Any, ...]], rename: Renaming
) -> dict[str, tuple[Any, ...]]:
    """Return the entries' new places: a path contains the parameter's name, and changes with it."""
    return {
        new.name: tuple(
            # Places in a list are numbers.
            _part(rename(part), place) if isinstance(part, str) else part
            for part in path
        )
        for name, path in paths.items()
        for place, new in enumerate(rename(name))
    }


def _steps(metadata: Metadata, rename: Renaming, target: str) -> Iterator[Step]:
    """Yield what becomes of each stored entry: a shard of a tensor, or an object."""
    entries: Mapping[str, Entry] = metadata.state_dict_metadata
    # storage_data knows a shard by its offsets alone. Its sizes are in the entry's chunks.
    shards = {
        (name, chunk.offsets): chunk
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for index in metadata.storage_data:
        for new in rename(index.fqn):
            entry = entries[index.fqn]
            if (layout := _layout(entry, new, target)) is not None:
                shard = shards[index.fqn, index.offset]
                for step in _shard_steps(index, shard, new.name, layout, target):
                    yield replace(step, shard=(entry.properties.dtype, shard.sizes))
            else:
                # Both w1 and w3 bring this value, but only one is kept: the two are compared.
                convert = None if new.layout is None else _unchanged
                yield Step(index, replace(index, fqn=new.name), convert)


def _part(new: tuple[Renamed, ...], place: int) -> Any:
    """Choose the name for ``place`` from the one or two names of a path's part."""
    # Only the part that is w13 itself has two names; what stands before and after it has one.
    return new[min(place, len(new) - 1)].name


def _layout(entry: Entry, new: Renamed, target: str) -> Layout | None:
    """Return the layout of a tensor with its parameter's shape: a weight or an optimizer moment."""
    if new.layout is None or not isinstance(entry, TensorStorageMetadata):
        return None
    # An optimizer also keeps scalars under a parameter's name, such as its step count. They are
    # renamed, not reshaped: the number of dimensions tells them apart.
    dims = new.layout.dims if target == TITAN_2026_09 else new.layout.dims + 1
    return new.layout if len(entry.size) == dims else None


def _reshaped(name: str, entry: Entry, new: Renamed, target: str) -> Entry:
    if (layout := _layout(entry, new, target)) is None:
        return entry
    assert isinstance(entry, TensorStorageMetadata)
    size = layout.size_after if target == TITAN_2026_09 else layout.size_before
    try:
        boxes = [_box(chunk, layout, target) for chunk in entry.chunks]
    except EzpzError as error:
        raise EzpzError(
            f"{name}: {error}, so no shard of torchtitan {target} can hold it. Save the "
            "checkpoint on a different number of ranks."
        ) from error
    return _resized(entry, size(entry.size), [box for box in boxes if box is not None])


def _shard_steps(
    index: MetadataIndex, shard: ChunkStorageMetadata, name: str, layout: Layout, target: str
) -> Iterator[Step]:
    if (box := _box(shard, layout, target)) is not None:
        convert = layout.to_newer if target == TITAN_2026_09 else layout.to_older
        yield Step(index, MetadataIndex(name, box.offsets), convert(shard))


def _box(shard: ChunkStorageMetadata, layout: Layout, target: str) -> ChunkStorageMetadata | None:
    return layout.box_after(shard) if target == TITAN_2026_09 else layout.box_before(shard)


def _unchanged(value: Any) -> Any:
    return value


def _resized(
    entry: TensorStorageMetadata, size: torch.Size, chunks: list[ChunkStorageMetadata]
) -> TensorStorageMetadata:
    # Older torch does not record strides.
    strides = getattr(entry.properties, "strides", None)
    properties = entry.properties
    if strides is not None:
        properties = replace(properties, strides=torch.empty(size, device="meta").stride())
    return TensorStorageMetadata(properties, size, chunks)


def _joined(name: str, before: Entry | None, entry: Entry) -> Entry:
    """Return the metadata of what two entries of the source become together."""
    if before is None or before == entry:
        return entry
    if (
        not isinstance(before, TensorStorageMetadata)
        or not isinstance(entry, TensorStorageMetadata)
        or (before.size, before.properties) != (entry.size, entry.properties)
    ):
        raise EzpzError(f"{name}: it stacks w1 and w3, but they differ in shape or dtype.")
    # w1 and w3 become two sets of shards of one tensor, w13: nothing is stacked in memory.
    return replace(before, chunks=[*before.chunks, *entry.chunks])
