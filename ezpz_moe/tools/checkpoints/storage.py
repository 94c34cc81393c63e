"""Checkpoints of torch.distributed.checkpoint (DCP) on a disk, entry by entry.

A DCP checkpoint is a file ``.metadata`` and data files. A data file is a sequence of entries, each
a ``torch.save`` of one tensor (or a rank's shard of it) or of one object; ``.metadata`` says where
each entry is. Both may be a stranger's: see :mod:`ezpz_moe.hosts.dcp.unpickling`.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp import metadata as dcp_metadata
from ezpz_moe.hosts.dcp.metadata import reason
from ezpz_moe.hosts.dcp.paths import METADATA, refuse_other_folders
from ezpz_moe.tools.checkpoints.data_files import check_data

_BLOCK = 16 * 2**20  # bytes


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the checkpoint in ``folder``, without running anything that it names.

    Raises:
        EzpzError: it is missing or damaged, or names something that no metadata needs.
    """
    refuse_other_folders(folder)
    return dcp_metadata.read_metadata(folder)


def check_metadata(folder: Path) -> None:
    """Check a checkpoint before the trainer resumes from it, which unpickles its metadata.

    Raises:
        EzpzError: as :func:`read_metadata` and :func:`check_data`; or the installed torch cannot
            read what another one saved.
    """
    check_data(folder, read_metadata(folder))
    dcp_metadata.check_torch_reads(folder)


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write the metadata, and wait until it is on the disk."""
    # In place, where DCP renames a temporary file: callers rename the whole folder at the end.
    with (folder / METADATA).open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


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
    """Load the tensor or object of an entry: what torch's ``weights_only`` allows, and no code.

    Raises:
        EzpzError: it is compressed, holds other objects, or torch did not save it.
    """
    file = folder / entry.relative_path
    if entry.transform_descriptors:
        raise EzpzError(f"{file}: is compressed, which ezpz_moe cannot read.")
    with file.open("rb") as stream:
        stream.seek(entry.offset)
        # torch.load needs a file that ends with the entry; the data file goes on.
        saved = io.BytesIO(stream.read(entry.length))
    try:
        # map_location: a pickled object may hold a GPU's tensors, and has to open without one. DCP
        # moves only tensors to the CPU that have an entry of their own.
        return torch.load(saved, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise anything
        what = _refused(saved) or f"cannot be read: {reason(error)}"
        raise EzpzError(f"{file}, byte {entry.offset}: {what}.") from error


def load_tensor(
    folder: Path, entry: _StorageInfo, dtype: torch.dtype, shape: torch.Size
) -> torch.Tensor:
    """Load a tensor, or a shard of one, that the metadata describes so.

    Raises:
        EzpzError: as :func:`load`; or it is something else.
    """
    value = load(folder, entry)
    if not isinstance(value, torch.Tensor) or (value.dtype, value.shape) != (dtype, shape):
        raise EzpzError(
            f"{folder / entry.relative_path}, byte {entry.offset}: does not hold the {dtype} "
            f"{list(shape)} that {METADATA} describes."
        )
    return value


def _refused(saved: io.BytesIO) -> str:
    """Return why an entry is not unpickled; empty if the reason is another one."""
    try:
        saved.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(saved)
    except Exception:  # it is damaged
        return ""
    return f"names {names[0]!r}, which is not run" if names else ""


def copy(source: Path, entry: _StorageInfo, target: Path) -> _StorageInfo:
    """Append an entry's bytes, unread, to the target's file of the same name; return their place.

    Raises:
        OSError: the file cannot be written.
        EzpzError: as :func:`blocks`.
    """
    return _append(target, entry, lambda stream: stream.writelines(blocks(source, entry)))


def append(value: Any, entry: _StorageInfo, target: Path) -> _StorageInfo:
    """Append a value in place of ``entry`` to the target's file of the same name; return its place.

    Raises:
        OSError: the file cannot be written.
    """
    return _append(target, entry, lambda stream: save(value, stream))


def _append(target: Path, entry: _StorageInfo, write: Callable[[BinaryIO], None]) -> _StorageInfo:
    file = target / entry.relative_path
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab") as stream:
        offset = stream.tell()
        write(stream)
        # replace() keeps how the bytes are compressed, for those that were only copied.
        return replace(entry, offset=offset, length=stream.tell() - offset)


def sync(folder: Path, entries: Iterable[_StorageInfo]) -> None:
    """Wait until the files of these entries are on the disk: they have to survive a crash."""
    for name in {entry.relative_path for entry in entries}:
        with (folder / name).open("rb") as stream:
            # A file opened for reading will do: fsync() is about the file, not about who wrote.
            os.fsync(stream.fileno())


def same_bytes(folder: Path, entry: _StorageInfo, other: Path, copied: _StorageInfo) -> bool:
    """Return whether two entries have the same bytes on the disk."""
    pairs = itertools.zip_longest(blocks(folder, entry), blocks(other, copied))
    return entry.length == copied.length and all(a == b for a, b in pairs)


def save(value: Any, stream: BinaryIO) -> None:
    """Append an entry as DCP would.

    Raises:
        OSError: the stream cannot be written.
    """
    try:
        torch.save(value, stream)
    except RuntimeError as error:
        # Of a full disk torch says only that a position is not the one that it expected.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def same_bits(a: Any, b: Any) -> bool:
    """Return whether two tensors, NaNs included, or two objects are the same."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, because NaN is not equal to itself.
    as_bytes = (each.contiguous().flatten().view(torch.uint8) for each in (a, b))
    return torch.equal(*as_bytes)
