"""Keep ``telemetry.jsonl`` from growing without end: neighbours among older records become one.

The newest quarter of the file stays as it was written. Of the others those go first that cover the
fewest steps, so that after a long run all of them cover about equally many. A little is done at a
time, because the training run waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence, Set
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.alerts import Alerts
from ezpz_moe.telemetry.lines import Line, content_of, records_on, spelled, surviving
from ezpz_moe.telemetry.merging import fit, merged

LIMIT = 2**28
"""Bytes of a file that is not compacted: some thousand records of 61 layers of 256 experts."""

_PARTS = 16
"""At a time, this part of the limit becomes free."""

logger = logging.getLogger(__name__)

_begins: dict[Path, set[int]] = {}
"""Steps after which a file's records are of another kind than before, as far as they are known."""
_uncompacted: set[Path] = set()
"""Files that could not be compacted, and whose next failure is not said again."""
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
            groups = _groups_that_fit(surviving(file, path), limit, file, path)
            out.writelines(_written(groups, file, path))
            out.flush()
            os.fsync(out.fileno())
        # Not if somebody else has written a line meanwhile: it would be lost.
        if path.stat().st_size == before:
            partial.replace(path)
    except (EzpzError, OSError) as error:
        if path not in _uncompacted:
            logger.warning(
                "ezpz_moe: %s: has more than %.3g MB and cannot be compacted: %s The run goes on, "
                "and the file grows until this is repaired.",
                path,
                limit / 1e6,
                error if isinstance(error, EzpzError) else f"{error.strerror or error}.",
            )
        _uncompacted.add(path)
    else:
        _uncompacted.discard(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    _last_size[path] = path.stat().st_size


def groups_of(lines: Sequence[Line], limit: int, begins: Set[int]) -> list[list[Line]]:
    """Return which neighbours become one record; most are alone.

    Args:
        lines: those that count.
        limit: bytes; a part of it is to become free.
        begins: steps after which the records are of another kind.
    """
    newest = sum(size <= limit // 4 for size in accumulate(line.length for line in lines[::-1]))
    older = [[line] for line in lines[: len(lines) - newest]]
    to_free = limit // _PARTS
    while to_free > 0 and (
        sums := [_steps(*pair) for pair in pairwise(older) if _meet(*pair, begins)]
    ):
        older, freed = _paired(older, 2 * min(sums), to_free, begins)
        to_free -= freed
    return older + [[line] for line in lines[len(lines) - newest :]]


def _paired(
    groups: Sequence[list[Line]], below: int, to_free: int, begins: Set[int]
) -> tuple[list[list[Line]], int]:
    """Join pairs of less than ``below`` steps, oldest first, until enough bytes are free."""
    made: list[list[Line]] = []
    freed, rest = 0, list(groups)[::-1]
    while rest:
        group = rest.pop()
        has_next = freed < to_free and rest and _meet(group, rest[-1], begins)
        if has_next and _steps(group, rest[-1]) < below:
            other = rest.pop()
            # The longer of the two is about what both become.
            freed += min(max(line.length for line in each) for each in (group, other))
            group = group + other
        made.append(group)
    return made, freed


def _meet(group: Sequence[Line], other: Sequence[Line], begins: Set[int]) -> bool:
    """Return whether two groups may become one: no step is missing between them."""
    last = group[-1].step
    return _before(other[0]) == last and last not in begins


def _before(line: Line) -> int:
    return line.step - line.steps


def _steps(*groups: Sequence[Line]) -> int:
    return sum(line.steps for group in groups for line in group)


def _groups_that_fit(
    lines: Sequence[Line], limit: int, file: BinaryIO, path: Path
) -> list[list[Line]]:
    """Return :func:`groups_of`, none with records of two kinds.

    A resumed run may have other settings. Only the records themselves say so, of which few are
    read: those that would become one.
    """
    begins = _begins.setdefault(path, set())
    while True:
        groups = groups_of(lines, limit, begins)
        found = {
            _before(line)
            for group in groups
            if len(group) > 1
            for line, pair in zip(group[1:], pairwise(records_on(group, file, path)), strict=True)
            if not fit(*pair)
        }
        if not found:
            return groups
        begins |= found


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
        yield spelled(merged(list(records_on(group, file, path)), alerts))
