"""A folder that is there when it is finished, and not before."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ezpz_moe.errors import EzpzError


@contextlib.contextmanager
def atomic_folder(target: Path, *, source: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` at the end of the ``with``.

    What a killed run leaves ends in ``.partial``, and the next run removes it; after an error or
    Ctrl-C nothing is left.

    Args:
        source: what is read meanwhile.
        needed: bytes that will be written.

    Raises:
        EzpzError: ``target`` exists, would need the place of ``source``, or cannot be written; the
            disk is too small; or what is read or written in the ``with`` fails.
    """
    if target.exists():
        raise EzpzError(f"{target}: exists already. Choose another folder, or remove it.")
    # Without "step-N" in it, by which the host would take it for a checkpoint.
    partial = target.with_name(f"{target.name.replace('-', '_')}.partial")
    if partial.resolve() == source.resolve():
        raise EzpzError(f"{source}: {target} would be written there first. Choose another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(target.parent).free):
            raise EzpzError(f"{target}: needs {needed} bytes, and the disk has {free} free.")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(target)
    except OSError as error:
        raise EzpzError(
            f"{target} is not written: {error.filename or partial}: {error.strerror}."
        ) from error


def size_of(files: Iterable[Path]) -> int:
    """Bytes of all files together."""
    return sum(file.stat().st_size for file in files)
