"""Which entry of a checkpoint becomes which under another generation's names. Reads no data.

Main keeps w1 and w3 in one tensor, w13 (:mod:`.layouts`). The optimizer's moments follow their
weights. Whatever else it keeps for a parameter, such as a step count or a rate, exists once for
both and has to be equal.
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

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.layouts import Layout
from ezpz_moe.tools.checkpoints.names import MAIN, Renamed, renaming

Convert = Callable[[Any], Any]
Entry: TypeAlias = TensorStorageMetadata | BytesStorageMetadata


@dataclass(frozen=True)
class Step:
    """A stored entry of the source, and an entry that it becomes.

    Attributes:
        convert: turns the old tensor or object into the new one; None keeps the stored bytes.
    """

    source: MetadataIndex
    target: MetadataIndex
    convert: Convert | None = None


@dataclass
class Plan:
    """How to get to another generation's names.

    Attributes:
        entries: the new metadata of every tensor and object.
        paths: where each belongs in the trainer's nested state.
        steps: at least one for every stored entry of the source.
        changed: how many of the source's names change.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    paths: dict[str, tuple] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    changed: int = 0


def make_plan(metadata: Metadata, source: str, target: str) -> Plan:
    """The plan from generation ``source`` to ``target``.

    Raises:
        EzpzError: a shard has no counterpart in the target; w1 and w3 have different shapes.
    """
    entries: Mapping[str, Entry] = metadata.state_dict_metadata
    rename = renaming(entries, source, target)
    plan = Plan()
    for name, entry in entries.items():
        new = rename(name)
        plan.changed += any(each.name != name for each in new)
        for each in new:
            reshaped = _reshaped(name, entry, each, target)
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
            layout = _layout(entries[index.fqn], each, target)
            if layout is not None:
                plan.steps += _shard_steps(
                    index, shards[index.fqn, index.offset], each.name, layout, target
                )
            else:
                # Both w1 and w3 bring this value, and main keeps one: the two are compared.
                convert = None if each.layout is None else _unchanged
                plan.steps.append(Step(index, replace(index, fqn=each.name), convert))
    return plan


def _part(new: tuple[Renamed, ...], place: int) -> Any:
    """From the one or two names of a path's part, the one for ``place``."""
    return new[min(place, len(new) - 1)].name


def _layout(entry: Entry, new: Renamed, target: str) -> Layout | None:
    """The layout of a tensor with its parameter's shape: a weight or an optimizer moment."""
    if new.layout is None or not isinstance(entry, TensorStorageMetadata):
        return None
    dims = new.layout.dims if target == MAIN else new.layout.dims + 1
    return new.layout if len(entry.size) == dims else None


def _reshaped(name: str, entry: Entry, new: Renamed, target: str) -> Entry:
    if (layout := _layout(entry, new, target)) is None:
        return entry
    assert isinstance(entry, TensorStorageMetadata)
    size = layout.size_in_main if target == MAIN else layout.size_before
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
        convert = layout.to_main if target == MAIN else layout.from_main
        yield Step(index, MetadataIndex(name, box.offsets), convert(shard))


def _box(shard: ChunkStorageMetadata, layout: Layout, target: str) -> ChunkStorageMetadata | None:
    return layout.box_in_main(shard) if target == MAIN else layout.box_before(shard)


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
    """The metadata of what two entries of the source become together."""
    if before is None or before == entry:
        return entry
    if (
        not isinstance(before, TensorStorageMetadata)
        or not isinstance(entry, TensorStorageMetadata)
        or (before.size, before.properties) != (entry.size, entry.properties)
    ):
        raise EzpzError(f"{name}: it stacks w1 and w3, but they differ in shape or dtype.")
    return replace(before, chunks=[*before.chunks, *entry.chunks])
