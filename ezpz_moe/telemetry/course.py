"""The course of a run, read so that it takes little memory however long the run was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ezpz_moe.telemetry.alerts import Alert, Alerts
from ezpz_moe.telemetry.json_lines import records_of
from ezpz_moe.telemetry.merging import fit, joined
from ezpz_moe.telemetry.record import StepRecord

MOST = 1024
"""From twice as many records on, neighbours are joined: more than any picture has columns."""


@dataclass(frozen=True)
class Course:
    """A run, from its first step to its last.

    Attributes:
        records: in the order of their steps, the last one whole; the others without what only
            describes one record, and maybe each in place of several.
        alerts: every one that the records in the file raised.
        number: how many records the file has.
    """

    records: list[StepRecord]
    alerts: list[Alert]
    number: int


def course(path: Path, most: int = MOST) -> Course:
    """Read a run's file, one record at a time.

    Raises:
        EzpzError: as :func:`.read`.
    """
    watch, alerts, records = Alerts(), list[Alert](), list[StepRecord]()
    number, limit, last = 0, 2 * most, None
    for last in records_of(path):
        alerts += watch.raised(last)
        records.append(_slim(last))
        number += 1
        if len(records) >= limit:
            records = _halved(records[:-1]) + records[-1:]
            # Where few neighbours fit, as of a run with ever other settings, more are kept.
            limit = max(limit, 2 * len(records))
    return Course([*records[:-1], *([last] if last else [])], alerts, number)


def _halved(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Join each with its neighbour where they fit."""
    made: list[StepRecord] = []
    rest = list(records)[::-1]
    while rest:
        record = rest.pop()
        if rest and fit(record, rest[-1]):
            record = _slim(joined([record, rest.pop()]))
        made.append(record)
    return made


def _slim(record: StepRecord) -> StepRecord:
    """Return the record without what is large and in no picture over the steps."""
    # An array has the counts in a quarter of a tuple's memory, and serves every picture as well.
    counts: list[Any] = [np.array(layer.counts_E) for layer in record.layers]
    layers = tuple(
        replace(layer, counts_E=counts_E, probabilities_E=(), pairs=())
        for layer, counts_E in zip(record.layers, counts, strict=True)
    )
    return replace(record, layers=layers, merged=None)
