"""The load over the steps for a page: small cells as pixels, and what stands around them.

The page writes the words, so the picture is on it once, for a light and a dark one, and a panel
fits a phone. As vectors dozens of layers would take ten megabytes. Legend: E = routed experts,
C = pixels of the steps.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from matplotlib.colors import to_hex
from PIL import Image

from ezpz_moe.telemetry.charts import COLUMNS, LOAD, WIDE_FIT, Loads, changes
from ezpz_moe.telemetry.heat_map import Array
from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.telemetry.summary import first_step

_HIGH = 128  # pixels of the experts, at least


@dataclass(frozen=True)
class Panel:
    """A layer's load over the steps of the run.

    Attributes:
        layer: its number.
        experts: how many it has.
        high: pixels from the first expert, below, to the last.
        png: the picture.
    """

    layer: int
    experts: int
    high: int
    png: bytes


@dataclass(frozen=True)
class Panels:
    """The panels of all layers.

    Attributes:
        name: as that of a picture.
        png: all of them in one picture, which is written as a file.
        first: the step at the left edge.
        last: the step at the right edge.
        changes: where a resumed run changed [router] or [balance], as shares of the width.
    """

    name: ClassVar[str] = "load_over_steps"
    png: bytes
    first: int
    last: int
    changes: tuple[float, ...]
    panels: tuple[Panel, ...]


def panels_of(records: Sequence[StepRecord], loads: Loads, png: bytes) -> Panels:
    """Return the panels of a run; ``png`` has them in one picture."""
    first, last = first_step(records[0]), records[-1].step
    wide = COLUMNS if len(loads) <= WIDE_FIT else COLUMNS // 2
    # Pixels are evenly apart in steps; records need not be.
    step_C = first - 1 + (np.arange(wide) + 0.5) / wide * (last - first + 1)
    changed = tuple((step - first + 1) / (last - first + 1) for step in changes(records))
    made = tuple(_panel(layer, *load, step_C) for layer, load in loads.items())
    return Panels(png, first, last, changed, made)


def load_colours(number: int = 9) -> list[str]:
    """Return colours of the load from 1/4 to 4 times the mean, evenly apart on its scale."""
    return [to_hex(colour) for colour in LOAD.rgba(np.geomspace(0.25, 4.0, number))]


def _panel(layer: int, load_ES: Array, edges: Array, step_C: Array) -> Panel:
    """Draw one layer; ``step_C`` are the steps in the middle of each pixel."""
    load_EC = load_ES[:, np.searchsorted(edges[1:-1], step_C)]
    load_EC[:, (step_C < edges[0]) | (step_C > edges[-1])] = np.nan  # the layer was not there
    experts = len(load_EC)
    # Whole pixels for an expert: the browser blurs what it has to stretch.
    colours, palette = LOAD.indexed(load_EC[::-1].repeat(max(1, round(_HIGH / experts)), axis=0))
    image = Image.fromarray(colours).convert("P")
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return Panel(layer, experts, len(colours), buffer.getvalue())
