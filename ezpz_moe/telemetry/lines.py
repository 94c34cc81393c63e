"""A line of ``telemetry.jsonl``: a record with its figures, as JSON; and where the lines are.

docs/guides/telemetry.md explains every key.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.figures import layer_figures, over_layers
from ezpz_moe.telemetry.record import StepRecord

FORMAT = 1

logger = logging.getLogger(__name__)

_ADAPTER = TypeAdapter(StepRecord)
_HEAD = re.compile(rb'\{"format": 1, "step": (\d{1,15}), "steps": (\d{1,15}), ("merged": )?')


@dataclass(frozen=True)
class Line:
    """Where a record is in its file.

    Attributes:
        number: of the line, from 1.
        start: its first byte.
        length: in bytes, with the newline.
        step: the last of the record's.
        steps: how many it has.
        is_merged: whether it is several records in one.
    """

    number: int
    start: int
    length: int
    step: int
    steps: int
    is_merged: bool


def spelled(record: StepRecord) -> bytes:
    """Return the line of a record, with its newline."""
    return f"{json.dumps(as_json(record))}\n".encode()


def as_json(record: StepRecord) -> dict[str, Any]:
    """Return the record and its figures, ``format`` first: it identifies a truncated line."""
    # Figures are written for jq and other readers. read() ignores them and computes its own.
    figures_L = [layer_figures(layer, record.steps) for layer in record.layers]
    layers = [
        {**vars(layer), "figures": figures}
        for layer, figures in zip(record.layers, figures_L, strict=True)
    ]
    head = {"format": FORMAT, **vars(record), "thresholds": record.thresholds.to_dict()}
    # Before all that is long: whoever looks for the steps need not read the rest.
    if record.merged:
        head = {"format": FORMAT, "step": record.step, "steps": record.steps, "merged": None} | head
        head["merged"] = asdict(record.merged)
    else:
        del head["merged"]
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


def surviving(file: BinaryIO, path: Path) -> list[Line]:
    """Return the lines of a file that count, in the order of their steps.

    A run that resumes from a checkpoint repeats steps: a line replaces the earlier ones of its step
    and of later steps, which belong to the abandoned attempt. A truncated last line is left out
    with a warning in the log. Only a line that does not begin as we begin it is read as a whole.

    Raises:
        EzpzError: such a line is not a record.
    """
    lines: list[Line] = []
    start = 0
    for number, content in enumerate(file, start=1):
        if not content.endswith(b"\n") and is_cut(content):
            logger.warning(
                "%s, line %d: is truncated, because the run was killed or is still writing it; "
                "left out.",
                path,
                number,
            )
            break
        line = Line(number, start, len(content), *_head(content, f"{path}, line {number}"))
        start += len(content)
        # The later steps of an abandoned attempt did not lead to the weights that the run has now.
        while lines and lines[-1].step >= line.step:
            lines.pop()
        lines.append(line)
    return lines


def content_of(line: Line, file: BinaryIO) -> bytes:
    """Return the line, with its newline if it has one."""
    file.seek(line.start)
    return file.read(line.length)


def records_on(lines: Iterable[Line], file: BinaryIO, path: Path) -> Iterator[StepRecord]:
    """Yield the records on these lines, one at a time.

    Raises:
        EzpzError: a line is not a record.
    """
    for line in lines:
        content = content_of(line, file).removesuffix(b"\n")
        yield parsed(content, f"{path}, line {line.number}")


def _head(content: bytes, where: str) -> tuple[int, int, bool]:
    """Return step, steps and whether the record is of several."""
    if head := _HEAD.match(content):
        return int(head[1]), int(head[2]), head[3] is not None
    record = parsed(content.removesuffix(b"\n"), where)
    return record.step, record.steps, record.merged is not None


def is_cut(line: bytes) -> bool:
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


def parsed(line: bytes, where: str) -> StepRecord:
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
