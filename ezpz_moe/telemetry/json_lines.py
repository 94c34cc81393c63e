"""The records of a run as JSON lines in ``telemetry.jsonl``, each with its figures beside it.

docs/telemetry.md has every key of a line.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.figures import layer_figures, over_layers
from ezpz_moe.telemetry.record import StepRecord

FILE_NAME = "telemetry.jsonl"
FORMAT = 1

logger = logging.getLogger(__name__)

_ADAPTER = TypeAdapter(StepRecord)


def append(path: Path, record: StepRecord) -> None:
    """Add the record to the file as one line, and flush it. The folder is made if need be.

    A cut last line, which a killed run may have left, is removed first.

    Raises:
        EzpzError: the file cannot be written.
    """
    line = f"{json.dumps(_as_json(record))}\n".encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            _end_last_line(file)
            file.write(line)
    except OSError as error:
        raise EzpzError(f"{path}: cannot be written: {error}.") from error


def read(path: Path) -> list[StepRecord]:
    """The records of the file, in the order of their steps.

    A run that is resumed from a checkpoint repeats steps: a line replaces the earlier ones of its
    step and of later steps, which are of the abandoned attempt. A cut last line is left out with a
    warning in the log. Keys that are not a record's, such as the figures, are not read.

    Raises:
        EzpzError: there is no such file, it cannot be read, or a line is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise EzpzError(
            f"{path}: there is no such file. A run whose flavor has a [telemetry] table writes it "
            "into its dump_folder."
        ) from None
    except OSError as error:
        raise EzpzError(f"{path}: cannot be read: {error}.") from error
    records: list[StepRecord] = []
    *whole, rest = lines
    for number, line in enumerate(whole, start=1):
        _take(records, _parsed(line, f"{path}, line {number}"))
    if rest and _is_cut(rest):
        logger.warning(
            "%s, line %d: is cut off, for the run was killed or is writing it; left out.",
            path,
            len(lines),
        )
    elif rest:
        _take(records, _parsed(rest, f"{path}, line {len(lines)}"))
    return records


def _as_json(record: StepRecord) -> dict[str, Any]:
    """The record and its figures. ``format`` comes first, so that a cut line is known as ours."""
    figures_L = [layer_figures(layer, record.steps) for layer in record.layers]
    layers = [
        {**vars(layer), "figures": figures}
        for layer, figures in zip(record.layers, figures_L, strict=True)
    ]
    head = {"format": FORMAT, **vars(record), "thresholds": record.thresholds.to_dict()}
    del head["layers"]  # they come last: a reader of the line sees what is short first
    return _spelled({**head, "figures": over_layers(figures_L), "layers": layers})


def _spelled(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become strings, which pydantic and jq read as numbers.

    The names are those of the JSON mapping of Protocol Buffers.
    """
    match value:
        case dict():
            return {key: _spelled(item) for key, item in value.items()}
        case [dict(), *_]:
            return [_spelled(item) for item in value]
        case float() if math.isnan(value):
            return "NaN"
        case float() if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        case _:
            return value


def _end_last_line(file: Any) -> None:
    """Make the file end with a whole line."""
    end = file.seek(0, 2)
    if not end:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    start = file.read().rfind(b"\n") + 1
    file.seek(start)
    if _is_cut(file.read()):
        file.truncate(start)
    else:
        file.write(b"\n")


def _is_cut(line: bytes) -> bool:
    """Whether this is the beginning of one of our lines and no whole JSON."""
    ours = b'{"format": '
    if not (line.startswith(ours) or ours.startswith(line)):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


def _take(records: list[StepRecord], record: StepRecord) -> None:
    while records and records[-1].step >= record.step:
        records.pop()
    records.append(record)


def _parsed(line: bytes, where: str) -> StepRecord:
    """The record of a line; ``where`` is for the error."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise EzpzError(f"{where}: is no JSON: {error}. {_FOREIGN}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise EzpzError(f'{where}: has no "format". {_FOREIGN}')
    if content["format"] != FORMAT:
        raise EzpzError(
            f"{where}: format {content['format']!r}, and this ezpz_moe reads format {FORMAT}. "
            "Read it with the ezpz_moe that wrote it, or with a newer one."
        )
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise EzpzError(f"{where}: {key}: {first['msg']}. {_FOREIGN}") from None


_FOREIGN = "Is it a telemetry.jsonl that ezpz_moe wrote?"
