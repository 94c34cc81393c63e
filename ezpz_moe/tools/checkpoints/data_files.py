"""The files that hold a checkpoint's entries, as far as they are understood without torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.paths import METADATA
from ezpz_moe.hosts.dcp.unpickling import load_plain


def data_files(folder: Path, metadata: Any) -> list[Path]:
    """Return the files that hold the entries."""
    # Not all that end in .distcp: what else lies in the folder is none of the checkpoint's.
    return [folder / name for name in sorted(_places(metadata))]


def check_data(folder: Path, metadata: Any) -> None:
    """Check that every data file exists and is as long as the metadata says. Reads no data.

    Raises:
        EzpzError: one is missing or too short, or two entries are in the same place.
    """
    # The usual damage is a copy that was interrupted. Comparing lengths finds it in no time, even
    # for terabytes.
    for name, places in sorted(_places(metadata).items()):
        file, end = folder / name, 0
        for begin, length in sorted(places):
            if begin < end:
                raise EzpzError(
                    f"{folder / METADATA}: is damaged: two entries overlap at byte {begin} of "
                    f"{name}."
                )
            end = begin + length
        if not file.is_file():
            raise EzpzError(f"{file}: is missing. Was the whole checkpoint copied?")
        if (size := file.stat().st_size) < end:
            raise EzpzError(f"{file}: is truncated, at {size} of {end} bytes.")


def size_of(files: Iterable[Path]) -> int:
    """Return the total size of all files, in bytes. A folder or a broken link has none."""
    return sum(file.stat().st_size for file in files if file.is_file())


def whole_number(folder: Path, entry: Any) -> int | None:
    """Read an entry that holds a whole number; None if it holds anything else, or is damaged."""
    if entry.transform_descriptors:
        return None
    try:
        with (folder / entry.relative_path).open("rb") as file:
            file.seek(entry.offset)
            saved = zipfile.ZipFile(io.BytesIO(file.read(entry.length)))
        if saved.testzip() is not None:  # the name of a record that is damaged
            return None
        (pickled,) = (name for name in saved.namelist() if name.endswith("/data.pkl"))
        value = load_plain(saved.read(pickled))
    except Exception:  # a damaged pickle may raise anything; torch says what is wrong with it
        return None
    return value if type(value) is int else None


def _places(metadata: Any) -> dict[str, list[tuple[int, int]]]:
    """Return where each file's entries begin, and their lengths."""
    places: dict[str, list[tuple[int, int]]] = {}
    for entry in metadata.storage_data.values():
        places.setdefault(entry.relative_path, []).append((entry.offset, entry.length))
    return places
