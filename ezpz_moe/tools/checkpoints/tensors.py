"""Whole tensors of DCP checkpoints: read from their shards, or written one after another."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import storage

_DCP_FILE = "__0_0.distcp"  # as DCP names rank 0's first file


def read_whole(folder: Path, metadata: Metadata, name: str) -> torch.Tensor:
    """Read a tensor of a DCP checkpoint, assembled from its shards.

    Raises:
        EzpzError: a shard cannot be read, or is not as the metadata says.
    """
    entry = metadata.state_dict_metadata[name]
    dtype, tensor = entry.properties.dtype, None
    for chunk in entry.chunks:
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        # Without an index's third field: DCP's hint, which does not count in comparing two.
        place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        shard = storage.load_tensor(folder, place, dtype, chunk.sizes)
        if tensor is None:
            # Only now: a size that nothing is stored for may be too large for any memory. Shards
            # cover the whole tensor, so nothing stays unwritten.
            tensor = torch.empty(entry.size, dtype=dtype)
        tensor[box] = shard
    return torch.empty(entry.size, dtype=dtype) if tensor is None else tensor


def write_checkpoint(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> Metadata:
    """Write these whole tensors as a DCP checkpoint; return its metadata as read back."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    with (folder / _DCP_FILE).open("wb") as file:
        for name, tensor in tensors:
            start = file.tell()
            storage.save(tensor, file)
            zeros = torch.Size([0] * tensor.dim())
            properties = TensorProperties.create_from_tensor(tensor)
            # One shard per tensor is enough: DCP cuts it for any number of ranks when it loads.
            chunk = ChunkStorageMetadata(zeros, tensor.shape)
            entries[name] = TensorStorageMetadata(properties, tensor.shape, [chunk])
            place = _StorageInfo(_DCP_FILE, start, file.tell() - start)
            places[MetadataIndex(name, zeros)] = place
        file.flush()
        # What is read back for comparison must be what a crash would leave.
        os.fsync(file.fileno())
    # In the middle, each entry's path in the nested state that DCP flattened. A model's is flat.
    storage.write_metadata(folder, Metadata(entries, {name: (name,) for name in entries}, places))
    return storage.read_metadata(folder)


def check_same(
    written: Path, source: Path, name: str, tensor: torch.Tensor, expected: torch.Tensor
) -> None:
    """Compare what was read back with what was written, bit by bit.

    Raises:
        EzpzError: they differ.
    """
    if not storage.same_bits(tensor, expected):
        raise EzpzError(f"{written}: {name}, read back, differs from the one in {source}.")
