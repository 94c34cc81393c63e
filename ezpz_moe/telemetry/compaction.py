"""Keep ``telemetry.jsonl`` from growing without end: neighbours among older records become one.

The newest quarter of the file stays as it was written. Of the others those go first that cover the
fewest steps, so that after a long run all of them cover about equally many. A little is done at a
time, because the training run waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.alerts import Alerts
from ezpz_moe.telemetry.lines import Line, content_of, records_on, spelled, surviving
from ezpz_moe.telemetry.merging import fit, merged
from ezpz_moe.telemetry.record import StepRecord

LIMIT = 2**28
"""Bytes of a file that is not compacted: some thousand records of 61 layers of 256 experts."""

_PARTS = 16
"""At a time, this part of the limit becomes free."""

logger = logging.getLogger(__name__)

_last_size: dict[Path, int] = {}
"""What a file had after it was last compacted: one that stays large is not read at every step."""


def is_due(path: Path, limit: int = LIMIT) -> bool:
    """Return whether a file is beyond the limit, and by a part of it larger than it last was."""
    return path.stat().st_size > max(limit, _last_size.get(path, 0) + limit // _PARTS)


def compact(path: Path, limit: int = LIMIT) -> None:
    """Merge older records of a file, in place, so that a part of the limit becomes free.

    Totals stay, and so do the alerts that the records raised one by one, which are computed here
    and kept with what they are merged into. Abandoned attempts are left out. Whoever has the file
    open goes on reading the one of before; a crash leaves one of the two.

    A file that cannot be compacted stays as it is, with a warning in the log.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with path.open("rb") as file, partial.open("wb") as out:
            before = os.fstat(file.fileno()).st_size
            out.writelines(_written(groups_of(surviving(file, path), limit), file, path))
            out.flush()
            os.fsync(out.fileno())
        # Not if somebody else has written a line meanwhile: it would be lost.
        if path.stat().st_size == before:
            partial.replace(path)
    except (EzpzError, OSError) as error:
        logger.warning(
            "ezpz_moe: %s: has more than %.3g MB and cannot be compacted: %s The run goes on, and "
            "the file grows.",
            path,
            limit / 1e6,
            error if isinstance(error, EzpzError) else f"{error.strerror or error}.",
        )
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    _last_size[path] = path.stat().st_size


def groups_of(lines: Sequence[Line], limit: int) -> list[list[Line]]:
    """Return which neighbours become one record, if they fit; most are alone.

    Args:
        lines: those that count.
        limit: bytes; a part of it is to become free.
    """
    newest = sum(size <= limit // 4 for size in accumulate(line.length for line in lines[::-1]))
    older = [[line] for line in lines[: len(lines) - newest]]
    to_free = limit // _PARTS
    while to_free > 0 and (sums := [_steps(*pair) for pair in pairwise(older) if _meet(*pair)]):
        older, freed = _paired(older, 2 * min(sums), to_free)
        to_free -= freed
    return older + [[line] for line in lines[len(lines) - newest :]]


def _paired(groups: Sequence[list[Line]], below: int, to_free: int) -> tuple[list[list[Line]], int]:
    """Join pairs of less than ``below`` steps, oldest first, until enough bytes are free."""
    made: list[list[Line]] = []
    freed, rest = 0, list(groups)[::-1]
    while rest:
        group = rest.pop()
        if freed < to_free and rest and _meet(group, rest[-1]) and _steps(group, rest[-1]) < below:
            other = rest.pop()
            # The longer of the two is about what both become.
            freed += min(max(line.length for line in each) for each in (group, other))
            group = group + other
        made.append(group)
    return made, freed


def _meet(group: Sequence[Line], other: Sequence[Line]) -> bool:
    """Return whether no step is missing between two groups."""
    return other[0].step - other[0].steps == group[-1].step


def _steps(*groups: Sequence[Line]) -> int:
    return sum(line.steps for group in groups for line in group)


def _written(groups: Sequence[list[Line]], file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of the compacted file."""
    alerts, not_watched = Alerts(), list[Line]()
    for group in groups:
        if group[0].is_merged:  # it says what was known after it
            not_watched.clear()
        if len(group) == 1:
            not_watched += group
            yield content_of(group[0], file)
            continue
        for record in records_on(not_watched, file, path):
            alerts.raised(record)
        not_watched.clear()
        for lines, records in _fitting(group, list(records_on(group, file, path))):
            # Watched all the same: what follows goes on from there.
            one = merged(records, alerts)
            yield content_of(lines[0], file) if len(lines) == 1 else spelled(one)


def _fitting(
    group: Sequence[Line], records: Sequence[StepRecord]
) -> Iterator[tuple[list[Line], list[StepRecord]]]:
    """Yield a group in parts whose records fit: a resumed run may have other settings."""
    begins = [0, *(n for n, pair in enumerate(pairwise(records), 1) if not fit(*pair))]
    for begin, end in pairwise([*begins, len(records)]):
        yield list(group[begin:end]), list(records[begin:end])
