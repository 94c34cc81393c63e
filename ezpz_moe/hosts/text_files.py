"""Read a file of text that the user names, whatever its lines hold; what is wrong is one line."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.our_texts import COMPRESSED

_ARROWS = dict(zip(COMPRESSED, ("gzip", "zstd", "bz2", "lz4"), strict=True))
"""A file's ending, and the name that Arrow has for its compression."""


def stamped(path: str) -> tuple[Path, int, int]:
    """Return a file, its time and its size: a file that was edited since is another cache key.

    Raises:
        EzpzError: there is no such file.
    """
    file = Path(path)
    if not path or not file.is_file():
        raise EzpzError(f"dataset_path = {path!r} is not a file.")
    stamp = file.stat()
    return file, stamp.st_mtime_ns, stamp.st_size


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a message for the user.

    Raises:
        EzpzError: it cannot be read, or is not UTF-8.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise EzpzError(f"dataset_path = '{file}' cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise EzpzError(
            f"dataset_path = '{file}' is not UTF-8 text: byte {error.start} "
            f"({error.reason}). Convert it, for example with iconv."
        ) from error


def text_in(file: Path) -> str:
    """Return what a file has, decompressed by its name's ending, with ``\\n`` as line breaks."""
    with _opened(file) as stream:
        # -sig drops the byte order mark that Windows editors write; it would become a token.
        text = stream.read().decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def first_line_in(file: Path) -> str:
    """Return the first line that is not blank, or nothing, without reading the rest."""
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as lines:
        return next((line for line in lines if line.strip()), "")


def _opened(file: Path) -> Any:
    # Named, because Arrow's own "detect" knows the endings in small letters alone.
    return pa.input_stream(str(file), compression=_ARROWS.get(file.suffix.lower()))


def lines_in(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a ``.jsonl`` file that are not blank, with their numbers."""
    # Not splitlines(): it also splits at U+2028 and others, which JSON allows inside a string.
    for number, line in enumerate(text_in(file).split("\n"), start=1):
        if line.strip():
            yield number, line
