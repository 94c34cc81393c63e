"""Read a checkpoint's ``.metadata`` without running anything that it names.

Used by our own commands, and by a run before it resumes: the host unpickles the file without a
question.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.errors import EzpzError, printable
from ezpz_moe.hosts.dcp.paths import METADATA
from ezpz_moe.hosts.dcp.structure import check_structure
from ezpz_moe.hosts.dcp.torch_kinds import TORCH
from ezpz_moe.hosts.dcp.unpickling import Refused, load_metadata


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of the checkpoint in ``folder``.

    Raises:
        EzpzError: it is absent or damaged, or names something that no metadata needs.
    """
    file = folder / METADATA
    try:
        metadata = load_metadata(file.read_bytes(), TORCH)
        check_structure(metadata, TORCH)
    except Refused as error:
        raise EzpzError(
            f"{file}: names {error}, which no checkpoint's metadata needs. It was not run; do not "
            "resume from this folder."
        ) from error
    except Exception as error:  # a damaged pickle may raise anything
        raise EzpzError(
            f"{file}: cannot be read: {reason(error)}. Copy the checkpoint again, or take another "
            "step."
        ) from error
    return metadata


def check_torch_reads(folder: Path) -> None:
    """Check that the installed torch can read what :func:`read_metadata` has found harmless.

    Raises:
        EzpzError: another torch saved it in a form that this one does not know.
    """
    try:
        FileSystemReader(folder).read_metadata()
    except Exception as error:  # of an unknown form, torch raises whatever comes of it
        raise EzpzError(
            f"{folder / METADATA}: torch {torch.__version__} cannot read it: {reason(error)}. "
            "Resume with the torch that saved it."
        ) from error


def reason(error: Exception) -> str:
    """Return what an exception of Python or torch says, on one line."""
    said = printable(str(error).partition("\n")[0].strip().rstrip("."))
    return f"{said} ({type(error).__name__})" if said else type(error).__name__
