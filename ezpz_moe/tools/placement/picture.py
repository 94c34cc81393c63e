"""A picture of what ranks have, before and after. Legend: :mod:`ezpz_moe.tools.placement`.

Import this only to draw: matplotlib is slow to import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.charts import LOAD
from ezpz_moe.telemetry.heat_map import draw_cells, filled
from ezpz_moe.telemetry.look import LIGHT
from ezpz_moe.tools.placement.report import LayerPlacement, Placement

FILE = "placement.png"

_DPI = 130
_NAMES = 30  # of layers on an axis


def draw(placement: Placement, title: str, folder: Path) -> Path:
    """Draw the ranks' loads in every layer before and after, and the busiest rank's, into a PNG.

    Raises:
        EzpzError: the folder cannot be written to.
    """
    layers = [each for each in placement.layers if each.before.of_ranks]
    figure = _figure(layers, title)
    FigureCanvasAgg(figure)  # needs no display, and unlike pyplot it does not keep the figure
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / FILE, dpi=_DPI)
    except OSError as error:
        raise EzpzError(f"--plot {folder}: cannot be written: {error}.") from error
    return folder / FILE


def _figure(layers: list[LayerPlacement], title: str) -> Figure:
    # Inches: a row for each layer, and the rest for titles and scale.
    height = 1.9 + min(8.0, max(1.6, 0.22 * len(layers)))
    figure = Figure(figsize=(11, height), layout="constrained")
    figure.suptitle(title)
    first, second, lines = figure.subplots(1, 3, width_ratios=(2, 2, 1.6), sharey=True)
    for axes, name, of_ranks in (
        (first, "as it is", [each.before.of_ranks for each in layers]),
        (second, "placed", [each.after.of_ranks for each in layers]),
    ):
        draw_cells(axes, filled(of_ranks), LOAD, first_on_top=False)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set(title=name, xlabel="rank")
    bar = figure.colorbar(
        LOAD.bar,
        ax=[first, second],
        label="assignments / mean of the ranks",
        location="bottom",
        shrink=0.6,
        aspect=40,
    )
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    _busiest(lines, layers)
    figure.legend(*lines.get_legend_handles_labels(), loc="outside lower right", frameon=False)
    first.set_ylabel("layer")
    rows = np.arange(0, len(layers), -(-len(layers) // _NAMES))
    first.set_yticks(rows, [str(layers[row].layer) for row in rows])
    first.invert_yaxis()  # the first layer on top, in all three
    return figure


def _busiest(axes: Any, layers: list[LayerPlacement]) -> None:
    """Draw a line for each layer, from what its busiest rank has to what it is expected to have."""
    rows = np.arange(len(layers))
    before, after = (
        np.array([load.max_over_mean_of_records for load in loads], dtype=np.float64)
        for loads in ([each.before for each in layers], [each.after for each in layers])
    )
    axes.hlines(rows, after, before, color="0.75", linewidth=2)
    axes.plot(before, rows, "o", color=LIGHT.cv, label="as it is")
    axes.plot(after, rows, "o", color=LIGHT.loss, label="placed")
    axes.axvline(1, color=LIGHT.ink, linewidth=0.8)
    axes.set(title="busiest rank of a record", xlabel="assignments / mean of the ranks")
    axes.tick_params(length=2)
    axes.spines[["top", "right"]].set_visible(False)
