"""Rewrite a checkpoint with another generation's names, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import contents, storage
from ezpz_moe.tools.checkpoints.data_files import check_data, data_files, size_of
from ezpz_moe.tools.checkpoints.expert_order import read_order, write_order
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.names import TITAN_2026_09, current_name
from ezpz_moe.tools.checkpoints.plan import Entry, Step, make_plan
from ezpz_moe.tools.checkpoints.state import add_state

_MODEL_ALONE = (
    "It holds the model alone, as the host saves the last step unless "
    "checkpoint.last_save_model_only is false: no run can resume from it, but a new one can start "
    "from it, with --checkpoint.enable --checkpoint.initial_load_path and a new dump folder."
)

Progress = Callable[[list[Step]], Iterable[Step]]


@dataclass(frozen=True)
class Remapped:
    """What was done.

    Attributes:
        changed: how many names changed.
        entries: how many tensors, shards of tensors and objects were written and compared.
        notes: what could not be carried over, and what to do about it.
    """

    changed: int
    entries: int
    notes: tuple[str, ...]


def remap(source: Path, target: Path, to: str, *, progress: Progress = iter) -> Remapped:
    """Write the checkpoint in ``source`` to ``target`` under the names of generation ``to``.

    Memory holds one stored entry at a time: a tensor, or a rank's shard of one. Atomic: ``target``
    appears once everything has been written and compared with the source. A killed run leaves a
    folder that ends in ``.partial``, which the next run removes.

    Raises:
        EzpzError: ``source`` holds no complete checkpoint; it already has those names; its layout
        is unknown; what was written differs; and as :func:`atomic_folder`.
    """
    to = current_name(to)
    metadata = storage.read_metadata(source)
    check_data(source, metadata)
    order = read_order(source)
    generation = contents.generation(source, metadata)
    try:
        plan = make_plan(metadata, generation, to)
    except EzpzError as error:
        raise EzpzError(f"{source}: {error}") from error
    if not plan.changed:
        raise EzpzError(f"{source}: already has the names of torchtitan {to}.")
    notes = add_state(plan, source, metadata, to)
    if not contents.has_optimizer(metadata):
        notes.append(_MODEL_ALONE)
    # In the order of the files: reading and writing are then sequential.
    steps = sorted(plan.steps, key=lambda step: _place(metadata, step))
    needed = size_of(data_files(source, metadata))
    with atomic_folder(target, source=source, needed=needed) as partial:
        new = replace(
            metadata,
            # It says where the source was saved.
            storage_meta=None,
            state_dict_metadata=plan.entries,
            planner_data=plan.paths,
            storage_data=_write(source, partial, metadata, progress(steps)),
        )
        storage.write_metadata(partial, new)
        _verify(source, partial, metadata, progress(steps))
        _verify_names(source, partial, metadata, back=(to, generation))
        write_order(partial, order)
    return Remapped(plan.changed, len(new.storage_data), tuple(notes))


def _place(metadata: Metadata, step: Step) -> tuple[str, int]:
    entry = metadata.storage_data[step.source]
    return entry.relative_path, entry.offset


def _write(
    source: Path, target: Path, metadata: Metadata, steps: Iterable[Step]
) -> dict[MetadataIndex, _StorageInfo]:
    """Write the target's data files, under the same file names; return what is where in them."""
    written: dict[MetadataIndex, _StorageInfo] = {}
    origin: dict[MetadataIndex, str] = {}
    for step in steps:
        entry = metadata.storage_data[step.source]
        # w1 and w3 both bring this one.
        if step.target in written:
            _check_same(source, step, origin[step.target], metadata)
            continue
        # Renamed only: copy the bytes without unpickling, however large the entry is.
        if step.convert is None:
            written[step.target] = storage.copy(source, entry, target)
        else:
            converted = _converted(source, step, metadata)
            written[step.target] = storage.append(converted, entry, target)
        origin[step.target] = step.source.fqn
    storage.sync(target, written.values())
    return written


def _converted(source: Path, step: Step, metadata: Metadata) -> Any:
    """Load what a step converts, and convert it."""
    entry = metadata.storage_data[step.source]
    assert step.convert
    if step.shard:
        return step.convert(storage.load_tensor(source, entry, *step.shard))
    try:
        return step.convert(storage.load(source, entry))
    except (TypeError, ValueError, LookupError) as error:
        raise EzpzError(
            f"{source / entry.relative_path}: {step.source.fqn} is not in the form that a trainer "
            f"saves: {error}."
        ) from error


def _check_same(source: Path, step: Step, other: str, metadata: Metadata) -> None:
    """Check that what is kept once for w1 and w3 since September 2026 is equal for both."""
    entry = metadata.storage_data[step.source]
    of_other = metadata.storage_data[replace(step.source, fqn=other)]
    if not storage.same_bits(storage.load(source, entry), storage.load(source, of_other)):
        raise EzpzError(
            f"{source}: {other} and {step.source.fqn} differ, but torchtitan {TITAN_2026_09} keeps "
            f"one for both, {step.target.fqn}."
        )


def _verify(source: Path, target: Path, metadata: Metadata, steps: Iterable[Step]) -> None:
    """Read every written entry back from the disk and compare it with the source's."""
    written = storage.read_metadata(target).storage_data
    for step in steps:
        old, new = metadata.storage_data[step.source], written[step.target]
        if step.convert is None:
            same = storage.same_bytes(source, old, target, new)
        else:
            expected = _converted(source, step, metadata)
            same = storage.same_bits(storage.load(target, new), expected)
        if not same:
            raise EzpzError(
                f"{target / new.relative_path}: {step.target.fqn} differs from "
                f"{step.source.fqn} in {source}. Is the disk failing? Nothing was kept."
            )


def _verify_names(source: Path, target: Path, metadata: Metadata, back: tuple[str, str]) -> None:
    """Check that the target's names and shapes lead to the source's, and no shard lacks data."""
    new = storage.read_metadata(target)
    # There and back: a name that does not return to itself shows a mistake in the tables.
    plan = make_plan(new, *back)
    # The target may have more than the source: whatever its generation needs was added.
    lost = [
        name
        for name, entry in metadata.state_dict_metadata.items()
        if _shape(entry) != _shape(plan.entries.get(name))
        or (metadata.planner_data or {}).get(name) != plan.paths.get(name)
    ]
    without_data = [
        name
        for name, entry in new.state_dict_metadata.items()
        if not all(MetadataIndex(name, offset) in new.storage_data for offset in _offsets(entry))
    ]
    if lost or without_data:
        raise EzpzError(
            f"{target}: {', '.join(lost + without_data)} cannot be traced back to {source}. "
            "Nothing was kept; please report this."
        )


def _shape(entry: Entry | None) -> object:
    if not isinstance(entry, TensorStorageMetadata):
        return type(entry)
    # Not the number of shards: one that holds gate and up comes back as two. Their total stays.
    return entry.size, entry.properties.dtype, sum(each.sizes.numel() for each in entry.chunks)


def _offsets(entry: Entry) -> list[torch.Size | None]:
    """Return where a tensor's shards are; an object has one place."""
    return [c.offsets for c in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
