"""Where the experts of September 2026 and later hold the values of older ones, by shard.

A DCP tensor is a set of boxes. Every stored shard is converted on its own, so no two have to be in
memory at once. Legend: E = experts, F = their inner dimension, G = 2F rows of gate and up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ezpz_moe.errors import EzpzError

# Where they are needed, and not here: the table of names is read without torch too.
if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    OfTensor = Callable[[torch.Tensor], torch.Tensor]

_PAIR = 1
"""The dimension of the newer [E, 2, F, ...] that separates gate and up."""


class Layout(Protocol):
    """How the newer generations hold a tensor of the older ones (September 2026 changed it)."""

    @property
    def dims(self) -> int:
        """How many dimensions the older tensor has; the newer has one more."""

    def size_after(self, size: torch.Size) -> torch.Size:
        """Return the size of the newer tensor."""

    def size_before(self, size: torch.Size) -> torch.Size:
        """Return the size of the older tensor."""

    def box_after(self, box: ChunkStorageMetadata) -> ChunkStorageMetadata:
        """Return the box of the newer tensor that an older shard becomes.

        Raises:
            EzpzError: the shard is not a box there.
        """

    def box_before(self, box: ChunkStorageMetadata) -> ChunkStorageMetadata | None:
        """Return the older tensor's box in a newer shard; None if the shard holds nothing of it.

        Raises:
            EzpzError: the shard is not a box there.
        """

    def to_newer(self, box: ChunkStorageMetadata) -> OfTensor:
        """Return a function that makes the newer shard from the older one, ``box``."""

    def to_older(self, box: ChunkStorageMetadata) -> OfTensor:
        """Return a function that makes the older shard from the newer one, ``box``."""


@dataclass(frozen=True)
class Half:
    """w1 or w3 [E, F, D], stacked as [E, 2, F, D] in the newer; ``place`` is 0 or 1."""

    place: int
    dims: int = 3

    def size_after(self, size: torch.Size) -> torch.Size:
        return _with(size, 2)

    def size_before(self, size: torch.Size) -> torch.Size:
        return _without(size)

    def box_after(self, box: ChunkStorageMetadata) -> ChunkStorageMetadata:
        return _box(_with(box.offsets, self.place), _with(box.sizes, 1))

    def box_before(self, box: ChunkStorageMetadata) -> ChunkStorageMetadata | None:
        # A rank's shard of w13 may hold gate alone, up alone, or both.
        if not 0 <= self.place - box.offsets[_PAIR] < box.sizes[_PAIR]:
            return None
        return _box(_without(box.offsets), _without(box.sizes))

    def to_newer(self, box: ChunkStorageMetadata) -> OfTensor:
        # A view is enough here: it has all of the tensor's values, so saving it saves no others.
        return lambda tensor: tensor.unsqueeze(_PAIR)

    def to_older(self, box: ChunkStorageMetadata) -> OfTensor:
        import torch

        place = self.place - box.offsets[_PAIR]
        # Copy, because saving a view would save all of what it views.
        return lambda tensor: tensor.select(_PAIR, place).clone(
            memory_format=torch.contiguous_format
        )


@dataclass(frozen=True)
class InTurn:
    """gpt_oss's [E, G, D] or bias [E, G], gate and up rows alternating: [E, 2, F, ...] since."""

    dims: int

    def size_after(self, size: torch.Size) -> torch.Size:
        return _size(size[0], 2, size[1] // 2, *size[2:])

    def size_before(self, size: torch.Size) -> torch.Size:
        return _size(size[0], 2 * size[2], *size[3:])

    def box_after(self, box: ChunkStorageMetadata) -> ChunkStorageMetadata:
        if box.offsets[1] % 2 or box.sizes[1] % 2:
            raise EzpzError("one of its shards ends between the rows of a gate and its up")
        first = _size(box.offsets[0], 0, box.offsets[1] // 2, *box.offsets[2:])
        return _box(first, self.size_after(box.sizes))

    def box_before(self, box: ChunkStorageMetadata) -> ChunkStorageMetadata:
        if box.sizes[_PAIR] != 2:
            raise EzpzError("one of its shards has gate without up, or up without gate")
        # Offsets map like sizes: f pairs before the shard are 2 f rows.
        return _box(self.size_before(box.offsets), self.size_before(box.sizes))

    def to_newer(self, box: ChunkStorageMetadata) -> OfTensor:
        # Rows are gate 0, up 0, gate 1, up 1, ...: group them by two, then separate the two.
        return lambda tensor: tensor.unflatten(1, (-1, 2)).transpose(1, 2).contiguous()

    def to_older(self, box: ChunkStorageMetadata) -> OfTensor:
        return lambda tensor: tensor.transpose(1, 2).flatten(1, 2).contiguous()


def _with(size: torch.Size, value: int) -> torch.Size:
    return _size(*size[:_PAIR], value, *size[_PAIR:])


def _without(size: torch.Size) -> torch.Size:
    return _size(*size[:_PAIR], *size[_PAIR + 1 :])


def _size(*parts: int) -> torch.Size:
    import torch

    return torch.Size(parts)


def _box(offsets: torch.Size, sizes: torch.Size) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets, sizes)
