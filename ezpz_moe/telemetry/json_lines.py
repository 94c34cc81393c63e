"""A run's records as JSON lines in ``telemetry.jsonl``, each with its figures.

docs/guides/telemetry.md explains every key.
"""

from __future__ import annotations

import json
import logging
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.figures import layer_figures, over_layers
from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.telemetry.where import FILE_NAME as FILE_NAME

FORMAT = 1

logger = logging.getLogger(__name__)

_ADAPTER = TypeAdapter(StepRecord)

_unwritable: set[Path] = set()
"""Files whose last line could not be written, and whose next failure is not said again."""


def append(path: Path, record: StepRecord) -> None:
    """Append the record to the file as one line, and flush it. Creates the folder if needed.

    First removes a truncated last line, which a killed run or a full disk may have left. If the
    file cannot be written, the line is lost, and the first such line of a file is a warning in the
    log: a record is not worth the end of a run, whose checkpoints may go to another disk.
    """
    line = f"{json.dumps(as_json(record))}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Mode a writes at the end, wherever _end_last_line() has read; two writers cannot overwrite
        # each other's lines.
        with path.open("ab+") as file:
            _end_last_line(file)
            file.write(line)
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
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise EzpzError(
            f"{path}: there is no such file. A run whose job or flavor has a [telemetry] table "
            "writes it into its dump_folder."
        ) from None
    except OSError as error:
        raise EzpzError(f"{path}: cannot be read: {error}.") from error
    records: list[StepRecord] = []
    # After the last newline nothing follows, unless a writer was interrupted.
    *whole, rest = lines
    for number, line in enumerate(whole, start=1):
        _take(records, _parsed(line, f"{path}, line {number}"))
    if rest and _is_cut(rest):
        logger.warning(
            "%s, line %d: is truncated, because the run was killed or is still writing it; left "
            "out.",
            path,
            len(lines),
        )
    elif rest:
        _take(records, _parsed(rest, f"{path}, line {len(lines)}"))
    return records


def as_json(record: StepRecord) -> dict[str, Any]:
    """Return the record and its figures, ``format`` first: it identifies a truncated line."""
    # Figures are written for jq and other readers. read() ignores them and computes its own.
    figures_L = [layer_figures(layer, record.steps) for layer in record.layers]
    layers = [
        {**vars(layer), "figures": figures}
        for layer, figures in zip(record.layers, figures_L, strict=True)
    ]
    head = {"format": FORMAT, **vars(record), "thresholds": record.thresholds.to_dict()}
    del head["layers"]  # they come last: whoever reads the line sees the short values first
    return _spelled({**head, "figures": over_layers(figures_L), "layers": layers})


def _spelled(value: Any) -> Any:
    """Spell NaN and infinity, which JSON lacks, as strings that pydantic and jq read as numbers.

    The names come from the JSON mapping of Protocol Buffers. A time is spelled as RFC 3339 has it.
    """
    match value:
        case dict():
            return {key: _spelled(item) for key, item in value.items()}
        case [dict(), *_]:
            return [_spelled(item) for item in value]
        case datetime():
            return value.isoformat()
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case _:
            return value


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
    if _is_cut(file.read()):
        file.truncate(start)
    else:
        file.write(b"\n")


def _is_cut(line: bytes) -> bool:
    """Return whether this is the beginning of one of our lines, but not complete JSON."""
    ours = b'{"format": '
    # A line that was cut within this prefix is ours too.
    if not (line.startswith(ours) or ours.startswith(line)):
        return False
    try:
        from_json(line)
    except ValueError:
        return True
    return False


def _take(records: list[StepRecord], record: StepRecord) -> None:
    # A resumed run repeats steps. The later ones of the abandoned attempt did not lead to the
    # weights that the run has now.
    while records and records[-1].step >= record.step:
        records.pop()
    records.append(record)


def _parsed(line: bytes, where: str) -> StepRecord:
    """Return the record on a line; ``where`` is for the error."""
    try:
        # Not json.loads: it raises other errors than ValueError for deep nesting, and takes half of
        # a surrogate pair for text, which nobody can then write.
        content = from_json(line)
    except ValueError as error:
        raise EzpzError(f"{where}: is not JSON: {error}. {_FOREIGN}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise EzpzError(f'{where}: has no "format". {_FOREIGN}')
    if content["format"] != FORMAT:
        raise EzpzError(
            f"{where}: has format {content['format']!r}, but this ezpz_moe reads format {FORMAT}. "
            "Read it with the ezpz_moe that wrote it, or with a newer one."
        )
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise EzpzError(f"{where}: {key}: {first['msg']}. {_FOREIGN}") from None


_FOREIGN = "Is it a telemetry.jsonl that ezpz_moe wrote?"
