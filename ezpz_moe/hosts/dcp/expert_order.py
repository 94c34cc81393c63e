"""The file beside a checkpoint that says which number each expert had at first, as bytes.

A run and an export carry it along. What is in it is the business of
:mod:`ezpz_moe.tools.checkpoints.expert_order`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ezpz_moe.errors import EzpzError

FILE = "expert_order.json"
"""Beside the metadata of a checkpoint whose experts have other numbers than at first."""


def read(checkpoint: Path) -> bytes | None:
    """Return what the file says; None without one: every expert has its first number.

    Raises:
        EzpzError: there is one, and it cannot be read.
    """
    try:
        return (checkpoint / FILE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EzpzError(
            f"{checkpoint / FILE}: cannot be read: {error.strerror}. Without it nobody knows which "
            "number each expert had at first."
        ) from error


def write(checkpoint: Path, said: bytes | None) -> None:
    """Write the file, if there is anything to say. The folder is made.

    Raises:
        OSError: it cannot be written.
    """
    if said is not None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        with (checkpoint / FILE).open("wb") as file:
            file.write(said)
            file.flush()
            os.fsync(file.fileno())
