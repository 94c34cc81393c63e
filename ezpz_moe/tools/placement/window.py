"""What a run's routers chose in its last steps. Legend: :mod:`ezpz_moe.tools.placement`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.json_lines import records_of
from ezpz_moe.telemetry.record import LayerRecord, StepRecord
from ezpz_moe.telemetry.summary import first_step
from ezpz_moe.telemetry.where import find_records
from ezpz_moe.tools.placement.orders import Floats


@dataclass(frozen=True)
class LayerWindow:
    """A layer in the records of a window.

    Attributes:
        number: its index in the model.
        counts_WE: assignments to each expert in each record.
        pairs_EE: how often a token of a sample chose two experts together, as far as records have
            the pair; symmetric, zeros on the diagonal. None if no record has any.
    """

    number: int
    counts_WE: Floats
    pairs_EE: Floats | None

    @property
    def experts(self) -> int:
        return self.counts_WE.shape[1]


@dataclass(frozen=True)
class Window:
    """The records of a run's last steps.

    Attributes:
        source: their file.
        first, last: the steps that they cover.
        steps_W: how many steps each record covers.
        job: what the run was started with: a job's path, or ``flavor NAME``; empty if it is not
            known.
    """

    source: Path
    first: int
    last: int
    steps_W: tuple[int, ...]
    job: str
    layers: tuple[LayerWindow, ...]

    @property
    def has_pairs(self) -> bool:
        return any(layer.pairs_EE is not None for layer in self.layers)

    def part(self, records: slice) -> Window:
        """Return the window with the counts of some of the records."""
        layers = (replace(each, counts_WE=each.counts_WE[records]) for each in self.layers)
        return replace(self, steps_W=self.steps_W[records], layers=tuple(layers))


def read_window(run: Path, steps: int) -> Window:
    """Read the records of the last ``steps`` steps of a run; at least the newest.

    Raises:
        EzpzError: there are none, or they cannot be read.
    """
    source = find_records(run)
    chosen: deque[StepRecord] = deque()
    for record in records_of(source):
        # A run that was resumed with other experts has others in its earlier records.
        if chosen and _experts(chosen[-1]) != _experts(record):
            chosen.clear()
        chosen.append(record)
        while chosen[0].step <= record.step - steps:
            chosen.popleft()
    if not chosen:
        raise EzpzError(
            f"{source}: holds no records yet: the run stopped or is still before its first one."
        )
    newest = chosen[-1]
    return Window(
        source=source,
        first=first_step(chosen[0]),
        last=newest.step,
        steps_W=tuple(record.steps for record in chosen),
        job=newest.job,
        layers=tuple(
            _layer([record.layers[place] for record in chosen])
            for place in range(len(newest.layers))
        ),
    )


def _experts(record: StepRecord) -> list[tuple[int, int]]:
    return [(layer.layer, len(layer.counts_E)) for layer in record.layers]


def _layer(of_records: Sequence[LayerRecord]) -> LayerWindow:
    counts_WE = np.array([layer.counts_E for layer in of_records], dtype=np.float64)
    if not any(layer.pairs for layer in of_records):
        return LayerWindow(of_records[0].layer, counts_WE, None)
    pairs_EE = np.zeros((counts_WE.shape[1],) * 2)
    for layer in of_records:
        a, b, times = np.array(layer.pairs, dtype=np.int64).reshape(-1, 3).T
        pairs_EE[a, b] += times
        pairs_EE[b, a] += times
    return LayerWindow(of_records[0].layer, counts_WE, pairs_EE)
