"""A run's records as JSON lines in ``telemetry.jsonl``, each with its figures.

docs/guides/telemetry.md explains every key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.compaction import LIMIT, compact, is_due
from ezpz_moe.telemetry.lines import as_json as as_json
from ezpz_moe.telemetry.lines import is_cut, records_on, spelled, surviving
from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.telemetry.where import FILE_NAME as FILE_NAME

logger = logging.getLogger(__name__)

_unwritable: set[Path] = set()
"""Files whose last line could not be written, and whose next failure is not said again."""


def append(path: Path, record: StepRecord, limit: int = LIMIT) -> None:
    """Append the record to the file as one line, and flush it. Creates the folder if needed.

    A file of more than ``limit`` bytes then gets room for the next ones: :func:`.compact`.

    First removes a truncated last line, which a killed run or a full disk may have left. If the
    file cannot be written, the line is lost, and the first such line of a file is a warning in the
    log: a record is not worth the end of a run, whose checkpoints may go to another disk.
    """
    line = spelled(record)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Mode a writes at the end, wherever _end_last_line() has read; two writers cannot overwrite
        # each other's lines.
        with path.open("ab+") as file:
            _end_last_line(file)
            file.write(line)
        if is_due(path, limit):
            compact(path, limit)
    except OSError as error:
        if path not in _unwritable:
            logger.warning(
                "ezpz_moe: %s: cannot be written: %s. The run goes on, without a record of step %d "
                "and of those until this is repaired.",
                path,
                error.strerror or error,
                record.step,
            )
        _unwritable.add(path)
    else:
        _unwritable.discard(path)


def read(path: Path) -> list[StepRecord]:
    """Read the records in the file, in the order of their steps.

    A run that resumes from a checkpoint repeats steps: a line replaces the earlier ones of its step
    and of later steps, which belong to the abandoned attempt. A truncated last line is left out
    with a warning in the log. Ignores keys that do not belong to a record, such as the figures.

    Raises:
        EzpzError: there is no such file, it cannot be read, or a line is not a record.
    """
    return list(records_of(path))


def records_of(path: Path) -> Iterator[StepRecord]:
    """Yield what :func:`read` returns, one record at a time; raises the same."""
    try:
        with path.open("rb") as file:
            yield from records_on(surviving(file, path), file, path)
    except FileNotFoundError:
        raise EzpzError(
            f"{path}: there is no such file. A run whose job or flavor has a [telemetry] table "
            "writes it into its dump_folder."
        ) from None
    except OSError as error:
        raise EzpzError(f"{path}: cannot be read: {error}.") from error


def _end_last_line(file: Any) -> None:
    """Make the file end with a complete line."""
    end = file.seek(0, 2)
    if not end:
        return
    file.seek(end - 1)
    # The usual case ends here, after reading one byte.
    if file.read(1) == b"\n":
        return
    file.seek(0)
    start = file.read().rfind(b"\n") + 1
    file.seek(start)
    # Only our own truncated line is removed. A complete one without its newline stays, and so does
    # anything that somebody else wrote.
    if is_cut(file.read()):
        file.truncate(start)
    else:
        file.write(b"\n")
