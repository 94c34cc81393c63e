"""A folder that appears only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ezpz_moe.errors import EzpzError


@contextlib.contextmanager
def atomic_folder(target: Path, *, source: Path, needed: int) -> Iterator[Path]:
    """Yield a folder to write into, which becomes ``target`` at the end of the ``with``.

    A killed run leaves a folder that ends in ``.partial``, which the next run removes. An error or
    Ctrl-C leaves nothing.

    Args:
        source: what is read in the meantime.
        needed: bytes that will be written.

    Raises:
        EzpzError: ``target`` exists, would overwrite ``source``, or cannot be written; the disk is
            too small; or reading or writing in the ``with`` fails.
    """
    check_target(target, source=source, needed=needed)
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Left by a killed run.
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            # Within the same folder, hence the same file system: renaming is atomic.
            partial.rename(target)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise EzpzError(
            f"{target} was not written: {error.filename or partial}: {error.strerror or error}."
        ) from error
    except SafetensorError as error:  # it does not say so in an OSError if the disk is full
        raise EzpzError(f"{target} was not written: {partial}: {error}.") from error


def check_target(target: Path, *, source: Path, needed: int) -> None:
    """Refuse what :func:`atomic_folder` would, as far as it can be known before. Makes nothing.

    Raises:
        EzpzError: ``target`` exists, would overwrite ``source``, or lies in no folder; or the disk
            is too small.
    """
    if os.path.lexists(target):  # also a link to nothing, which renaming would not replace
        raise EzpzError(f"{target}: already exists. Choose another folder, or remove it.")
    refuse_overwriting(source, target)
    there = next(folder for folder in target.absolute().parents if os.path.exists(folder))
    if not there.is_dir():
        raise EzpzError(f"{target} was not written: {there} is not a folder.")
    disk = shutil.disk_usage(there)
    # A file system of the kernel's own has no size; why it takes nothing is said when it is tried.
    if disk.total and needed > disk.free:
        raise EzpzError(f"{target}: needs {needed} bytes, but the disk has only {disk.free} free.")


def refuse_overwriting(source: Path, target: Path) -> None:
    """Refuse to write ``target`` where ``source`` is: in the folder that becomes it.

    Raises:
        EzpzError: names both.
    """
    if source.resolve().is_relative_to((partial := _partial(target)).resolve()):
        raise EzpzError(
            f"{source}: {target} would be written to {partial} first. Choose another name."
        )


def _partial(target: Path) -> Path:
    # The name must not contain "step-N", or the host would take it for a checkpoint.
    return target.with_name(f"{target.name.replace('-', '_')}.partial")
