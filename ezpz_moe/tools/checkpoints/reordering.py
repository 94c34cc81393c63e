"""Rewrite a checkpoint with the experts of its layers in another order.

The model computes what it did. Whatever counts a layer's experts changes alike (:mod:`.expert_rows`
knows what does): weights, biases, gates, selection biases, and what the optimizer keeps of them.
Everything else keeps its bytes, so a run resumes from either checkpoint. Every tensor keeps its
shards: their rows may come from others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import contents, expert_order, storage
from ezpz_moe.tools.checkpoints.data_files import check_data, data_files, size_of
from ezpz_moe.tools.checkpoints.expert_order import Order, check_order
from ezpz_moe.tools.checkpoints.expert_rows import ExpertRows, expert_rows
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.tensors import read_whole

_LAYER = re.compile(r"layers\.(\d+)")
Progress = Callable[[list[str]], Iterable[str]]
_Experts: TypeAlias = Mapping[str, Sequence[int]]
"""An order as tensors name it: by layer, such as "layers.3"."""


@dataclass(frozen=True)
class Reordered:
    """What was done.

    Attributes:
        experts: how many have another number now, of all layers together.
        layers: how many layers those are of.
        tensors: how many tensors changed, those of the optimizer included.
        with_optimizer: whether a run can resume from it; otherwise it holds the model alone.
    """

    experts: int
    layers: int
    tensors: int
    with_optimizer: bool


def permute_experts(
    source: Path, target: Path, order: Order, *, groups: int = 1, progress: Progress = iter
) -> Reordered:
    """Write the checkpoint in ``source`` to ``target`` with its experts in another order.

    Memory holds one tensor that changes at a time, and copies of it. Atomic: ``target`` appears
    once everything has been written and compared with the source. A killed run leaves a folder that
    ends in ``.partial``, which the next run removes. The order that leads back is kept in
    :data:`~.expert_order.FILE`, composed with that of the source.

    Args:
        order: expert i of a layer is to be the source's expert ``order[layer][i]``. A layer that is
            absent keeps its order.
        groups: as in :func:`~.expert_order.check_order`.
        progress: is given the names of all entries, twice: to write, and to compare.

    Raises:
        EzpzError: ``source`` holds no complete checkpoint, or a tensor that is not known; the order
            is not allowed, or changes nothing; what was written differs; and as
            :func:`atomic_folder`.
    """
    metadata = storage.read_metadata(source)
    check_data(source, metadata)
    first_order = expert_order.read_order(source)
    rows = rows_of(source, metadata)
    try:
        check_order(order, _experts_by_number(rows), groups=groups)
    except EzpzError as error:
        raise EzpzError(f"{source}: {error}") from error
    if not (order := expert_order.composed({}, order)):
        raise EzpzError(f"{source}: in this order every expert keeps its number. Nothing to do.")
    copy = _Copy(source, metadata, rows, _by_layer(order))
    needed = size_of(data_files(source, metadata))
    with atomic_folder(target, source=source, needed=needed) as partial:
        written = copy.write(partial, progress(copy.names))
        # storage_meta says where the source was saved.
        storage.write_metadata(partial, replace(metadata, storage_meta=None, storage_data=written))
        copy.compare(partial, _by_layer(expert_order.inverse(order)), progress(copy.names))
        expert_order.write_order(partial, expert_order.composed(first_order, order))
    moved = (i != former for of in order.values() for i, former in enumerate(of))
    return Reordered(sum(moved), len(order), len(copy.changed), contents.has_optimizer(metadata))


def rows_of(source: Path, metadata: Metadata) -> ExpertRows:
    """Return which tensors of a checkpoint count experts, its optimizer's among them.

    Raises:
        EzpzError: one may, and is not known.
    """
    sizes = {
        name: entry.size
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    try:
        return expert_rows(sizes)
    except EzpzError as error:
        raise EzpzError(f"{source}: {error}") from error


def _experts_by_number(rows: ExpertRows) -> dict[int, int]:
    """Return E of the model's layers, without those that predict further tokens."""
    found = ((_LAYER.fullmatch(layer), experts) for layer, experts in rows.num_experts.items())
    return {int(layer[1]): experts for layer, experts in found if layer}


def _by_layer(order: Order) -> _Experts:
    return {f"layers.{number}": former for number, former in order.items()}


class _Copy:
    """A checkpoint that is written once more, with its experts in another order."""

    def __init__(
        self, source: Path, metadata: Metadata, rows: ExpertRows, experts: _Experts
    ) -> None:
        self.source, self.metadata, self.rows, self.experts = source, metadata, rows, experts
        self.changed = {
            name
            for name, dims in rows.dims.items()
            if any(place.layer in experts for place in dims)
        }
        self.entries: dict[str, list[MetadataIndex]] = {}
        """Name -> what is stored of it: a tensor's shards, or an object."""
        # In the order of the files: reading is then sequential, but for shards of several ranks.
        places = metadata.storage_data
        for index in sorted(places, key=lambda each: _place(places[each])):
            self.entries.setdefault(index.fqn, []).append(index)

    @property
    def names(self) -> list[str]:
        return list(self.entries)

    def write(self, target: Path, names: Iterable[str]) -> dict[MetadataIndex, _StorageInfo]:
        """Write the data files, under the same file names; return what is where in them."""
        places, written = self.metadata.storage_data, {}
        for name in names:
            if name in self.changed:
                for index, shard in self._shards(name):
                    written[index] = storage.append(shard, places[index], target)
            else:
                for index in self.entries[name]:
                    written[index] = storage.copy(self.source, places[index], target)
        storage.sync(target, written.values())
        return written

    def _shards(self, name: str) -> Iterator[tuple[MetadataIndex, torch.Tensor]]:
        """Yield the shards of a tensor in the new order, each with nothing else in its storage."""
        whole = read_whole(self.source, self.metadata, name)
        whole = self.rows.take(name, whole, self.experts)
        for chunk in self.metadata.state_dict_metadata[name].chunks:
            box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
            # A view would be saved with all that it views.
            shard = whole[box].clone(memory_format=torch.contiguous_format)
            yield MetadataIndex(name, chunk.offsets), shard

    def compare(self, target: Path, back: _Experts, names: Iterable[str]) -> None:
        """Read what was written, bring it back to the first order, and compare it with the source.

        Raises:
            EzpzError: they differ.
        """
        written = storage.read_metadata(target)
        for name in names:
            if name in self.changed:
                tensor = self.rows.take(name, read_whole(target, written, name), back)
                same = storage.same_bits(tensor, read_whole(self.source, self.metadata, name))
            else:
                same = all(
                    storage.same_bytes(
                        self.source,
                        self.metadata.storage_data[index],
                        target,
                        written.storage_data[index],
                    )
                    for index in self.entries[name]
                )
            if not same:
                raise EzpzError(
                    f"{target}: {name}, read back, differs from the one in {self.source}. Is the "
                    "disk failing? Nothing was kept."
                )


def _place(entry: _StorageInfo) -> tuple[str, int]:
    return entry.relative_path, entry.offset
