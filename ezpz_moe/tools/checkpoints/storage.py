"""Checkpoints of torch.distributed.checkpoint (DCP) on a disk, entry by entry.

A DCP checkpoint is a file ``.metadata`` and data files. A data file is a sequence of entries, each
a ``torch.save`` of one tensor (or a rank's shard of it) or of one object; ``.metadata`` says where
each entry is.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.errors import EzpzError

METADATA = ".metadata"
_BLOCK = 16 * 2**20


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the checkpoint in ``folder``.

    Raises:
        EzpzError: it is missing, or cannot be read.
    """
    if not folder.is_dir():
        raise EzpzError(f"{folder}: there is no such folder.")
    if not (folder / METADATA).is_file():
        raise EzpzError(
            f"{folder}: holds no checkpoint of torch.distributed.checkpoint (no .metadata)."
            f"{_what_else(folder)}"
        )
    try:
        return FileSystemReader(folder).read_metadata()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise EzpzError(f"{folder / METADATA}: cannot be read: {error}.") from error


def _what_else(folder: Path) -> str:
    """Give a hint for a folder that does not hold a checkpoint itself."""
    if any(folder.glob("*.safetensors")):
        return " It holds safetensors, which ckpt remap reads with --model FLAVOR|JOB.toml."
    steps = [*folder.glob(f"step-*/{METADATA}"), *folder.glob(f"*/step-*/{METADATA}")]
    if not steps:
        return ""
    newest = max(steps, key=lambda path: path.stat().st_mtime)
    return f" There are checkpoints below it, such as {newest.parent}."


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write the metadata, and wait until it is on the disk."""
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


def data_files(folder: Path) -> list[Path]:
    """Return the files that hold the entries."""
    return sorted(folder.glob("*.distcp"))


def check_data(folder: Path, metadata: Metadata) -> None:
    """Check that every data file exists and is as long as the metadata says. Reads no data.

    Raises:
        EzpzError: one is missing or too short.
    """
    # The usual damage is a copy that was interrupted. Comparing lengths finds it in no time, even
    # for terabytes.
    ends: dict[str, int] = {}
    for entry in metadata.storage_data.values():
        end = entry.offset + entry.length
        ends[entry.relative_path] = max(end, ends.get(entry.relative_path, 0))
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            raise EzpzError(f"{file}: is missing. Was the whole checkpoint copied?")
        if (size := file.stat().st_size) < end:
            raise EzpzError(f"{file}: is truncated, at {size} of {end} bytes.")


def blocks(folder: Path, entry: _StorageInfo) -> Iterator[bytes]:
    """Read the bytes of an entry, a few MiB at a time.

    Raises:
        EzpzError: the file ends before the entry does.
    """
    with (folder / entry.relative_path).open("rb") as file:
        file.seek(entry.offset)
        left = entry.length
        while left:
            if not (block := file.read(min(left, _BLOCK))):
                raise EzpzError(f"{folder / entry.relative_path}: is truncated.")
            left -= len(block)
            yield block


def load(folder: Path, entry: _StorageInfo) -> Any:
    """Load the tensor or object of an entry. The caller trusts the checkpoint, as the trainer does.

    Raises:
        EzpzError: it is compressed, or torch did not save it.
    """
    file = folder / entry.relative_path
    if entry.transform_descriptors:
        raise EzpzError(f"{file}: is compressed, which ezpz_moe cannot read.")
    with file.open("rb") as stream:
        stream.seek(entry.offset)
        # torch.load needs a file that ends with the entry; the data file goes on.
        saved = io.BytesIO(stream.read(entry.length))
    try:
        return torch.load(saved, map_location="cpu", weights_only=False)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise EzpzError(f"{file}, byte {entry.offset}: cannot be read: {error}.") from error


def save(value: Any, stream: BinaryIO) -> None:
    """Append an entry as DCP would."""
    torch.save(value, stream)


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two tensors, NaNs included, or two objects are the same."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, because NaN is not equal to itself.
    as_bytes = (each.contiguous().flatten().view(torch.uint8) for each in (a, b))
    return torch.equal(*as_bytes)
