"""Routing token by token, in a ``.npz`` file per step and rank: docs/guides/telemetry.md.

Legend: L = MoE layers of the rank, T = its tokens of the step, E = experts, K = top-k.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "routing"
"""In a run's dump folder."""
ABANDONED = "abandoned"
"""In that one, for the files of steps that a resumed run repeats."""

_NAME = re.compile(r"step_(\d+)_rank_(\d+)\.npz")

logger = logging.getLogger(__name__)


def file_name(step: int, rank: int) -> str:
    """Return the name of a rank's file of a step."""
    return f"step_{step}_rank_{rank}.npz"


class Dumps:
    """The files of one rank in ``folder``."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.folder = folder
        self._rank, self._ranks = rank, ranks
        self._is_unwritable = False  # and its next failure is not said again

    def write(self, step: int, arrays: Mapping[str, Any]) -> None:
        """Write the file of a step from numpy's arrays, or nothing; replace one of the same step.

        If it cannot be written, the dump is lost, and the first one is a warning in the log: it is
        not worth the end of a run.
        """
        path = self.folder / file_name(step, self._rank)
        # Never a part of a dump under its name: neither after a full disk nor after a kill.
        partial = self.folder / f"rank_{self._rank}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if not self._is_unwritable:
                logger.warning(
                    "ezpz_moe: %s: cannot be written: %s. The run goes on, without this dump and "
                    "the next ones until this is repaired.",
                    path,
                    error.strerror or error,
                )
            self._is_unwritable = True
        else:
            self._is_unwritable = False

    def set_aside(self, step: int) -> list[Path]:
        """Move the files of ``step`` and later steps away: this run will make these steps again.

        They are of an attempt that was abandoned, perhaps of more ranks than there are now. Each
        rank moves those whose rank is its own modulo the number of ranks, so that all are moved
        and none twice.

        Returns:
            Where they are now.

        Raises:
            OSError: they cannot be moved.
        """
        if not self.folder.is_dir():
            return []
        found = ((path, _NAME.fullmatch(path.name)) for path in sorted(self.folder.iterdir()))
        later = [
            path
            for path, name in found
            if name and int(name[1]) >= step and int(name[2]) % self._ranks == self._rank
        ]
        return [self._moved(path) for path in later]

    def _moved(self, path: Path) -> Path:
        aside = self.folder / ABANDONED
        aside.mkdir(exist_ok=True)
        # Several attempts may have been abandoned.
        numbered = (aside / f"{path.stem}.{number}.npz" for number in itertools.count(1))
        target = next(each for each in numbered if not os.path.lexists(each))
        return path.rename(target)
