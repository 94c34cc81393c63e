"""Pictures of a report, one PNG for each measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ezpz_moe.telemetry.heat_map import Array, Palette, draw_cells, filled
from ezpz_moe.tools.analysis.report import LayerReport, Settings

_COLUMNS = 4
_DPI = 130
# More names than this would cover the picture: then the legend has every second or third layer.
_LEGEND_ROWS = 12

Layers = Sequence[LayerReport]


def draw(layers: Layers, settings: Settings, folder: Path) -> Iterator[Path]:
    """Draw every measure into ``folder``, creating it if needed; yields the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Layers, Settings], Figure]] = {
        "load": _load,
        "tokens": _tokens,
        "drops": _drops,
        "consistency": _consistency,
        "similarity": _similarity,
    }
    if any(each.drift for each in layers):
        pictures["drift"] = _drift
    for name, picture in pictures.items():
        figure, file = picture(layers, settings), folder / f"{name}.png"
        # Agg needs no display, and unlike pyplot it does not keep the figure.
        FigureCanvasAgg(figure)
        figure.savefig(file, dpi=_DPI)
        yield file


def _load(layers: Layers, _: Settings) -> Figure:
    """Draw each expert's share of the choices, as a multiple of an even share."""
    figure, axes = _one()
    loads = [[share * each.num_experts for share in each.load] for each in layers]
    # At least 2: on a scale of its own, an almost even load would look as uneven as any.
    most = max(2.0, *map(max, loads))
    # White is an even load; the two sides differ in length, so each has its own slope.
    palette = Palette(colormaps["RdBu_r"], TwoSlopeNorm(1, vmin=0, vmax=most))
    _expert_columns(axes, filled(loads), palette)
    figure.colorbar(palette.bar, ax=axes, label="load / even load")
    _layer_rows(axes, layers)
    axes.set(title="Load of the experts", xlabel="expert")
    return figure


def _tokens(layers: Layers, _: Settings) -> Figure:
    """Draw what the token ID predicts, and how narrow each expert's tokens are."""
    # Inches: 0.3 for the bars of a layer, and the rest for titles and legend.
    figure = Figure(figsize=(11, 0.3 * len(layers) + 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = np.arange(len(layers))
    for offset, label, values in (
        (-0.2, "token ID", [each.explained and each.explained.by_token for each in layers]),
        (0.2, "frequency", [each.explained and each.explained.by_frequency for each in layers]),
    ):
        left.barh(rows + offset, [value or 0 for value in values], height=0.38, label=label)
    # Bars are drawn from the bottom up; the first layer belongs at the top, as in the map.
    left.invert_yaxis()
    left.xaxis.set_major_formatter(PercentFormatter(1))
    left.set(title="Experts of a token predicted by", xlabel="share of its experts right")
    _legend_below(left)
    _layer_rows(left, layers)
    concentration_LE = filled([each.concentration for each in layers])
    # A scale needs some height, also where nothing is concentrated.
    most = float(np.nan_to_num(concentration_LE).max(initial=1e-9))
    palette = Palette(colormaps["viridis"], Normalize(0, most))
    _expert_columns(right, concentration_LE, palette)
    figure.colorbar(palette.bar, ax=right, label="1 - H(token | expert) / H(token)")
    right.set(title="Concentration of each expert's tokens", xlabel="expert")
    _layer_rows(right, layers)
    return figure


def _drops(layers: Layers, settings: Settings) -> Figure:
    """Draw drops along the sequence."""
    figure, axes = _one()
    parts = len(layers[0].dropped_by_position)
    middles = (np.arange(parts) + 0.5) / parts
    _lines(axes, layers, [(middles, each.dropped_by_position) for each in layers])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set(
        title=f"Dropped at a capacity factor of {settings.capacity_factor:g}",
        xlabel="position in the sequence",
        ylabel="share of the choices",
        xlim=(0, 1),
    )
    axes.set_ylim(bottom=0)
    return figure


def _consistency(layers: Layers, settings: Settings) -> Figure:
    """Draw segment routing by layer, and hit rates by cache size."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(layers)), [each.srp for each in layers])
    left.set(
        title=f"Segment routing best performance, {settings.segment} tokens",
        xlabel="layer",
        ylabel="F1",
        ylim=(0, 1),
    )
    left.set_xticks(range(len(layers)), [_short(each) for each in layers])
    _thin(left.get_xticklabels())
    sizes = [np.arange(1, each.num_experts + 1) for each in layers]
    hit_rates = [each.sch_by_size for each in layers]
    _lines(right, layers, list(zip(sizes, hit_rates, strict=True)))
    # The sizes of the caches whose hit rates the report has as figures: k may differ.
    for size in sorted({each.cache_size for each in layers}):
        right.axvline(size, color="grey", linestyle=":")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set(
        title=f"Segment cache best hit rate, {settings.segment} tokens",
        xlabel="experts in the cache",
        ylabel="hits",
    )
    # Some room above 1, or the frame would hide a curve that reaches it.
    right.set_ylim(0, 1.03)
    return figure


def _similarity(layers: Layers, _: Settings) -> Figure:
    """Draw cosines between experts' weights, one map per layer, all on one scale."""
    columns = min(_COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    # Inches: 2.6 for a map, and the rest for the scale and the title.
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    maps = [np.array(each.cosines, dtype=float) for each in layers]
    # One scale for all layers, from what differs: the diagonal is always 1.
    off = np.concatenate([m[~np.eye(len(m), dtype=bool)] for m in maps])
    limit = float(np.nanmax(np.abs(off), initial=1e-3))
    palette = Palette(colormaps["RdBu_r"], Normalize(-limit, limit))
    for axes, each, cosines in zip(grid, layers, maps, strict=False):
        np.fill_diagonal(cosines, np.nan)  # always 1, which would drown the others
        draw_cells(axes, cosines, palette)
        axes.set_aspect("equal")
        axes.set_title(f"layer {_short(each)}", fontsize=9)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    figure.colorbar(palette.bar, ax=list(grid), label="cosine of two experts' weights")
    figure.suptitle("Similarity of the experts")
    return figure


def _drift(layers: Layers, _: Settings) -> Figure:
    """Draw the tokens that the other checkpoint routes differently."""
    figure, axes = _one()
    rows = np.arange(len(layers))
    changed = [each.drift.changed if each.drift else 0 for each in layers]
    jaccard = [1 - each.drift.jaccard if each.drift else 0 for each in layers]
    axes.bar(rows - 0.2, changed, width=0.38, label="tokens with another set of experts")
    axes.bar(rows + 0.2, jaccard, width=0.38, label="1 - Jaccard of the two sets")
    axes.set_xticks(rows, [_short(each) for each in layers])
    _thin(axes.get_xticklabels())
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(title="Routing drift", xlabel="layer", ylim=(0, 1))
    _legend_below(axes)
    return figure


def _one() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    return figure, figure.subplots()


def _legend_below(axes: Any) -> None:
    """Add a legend that covers no bar."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _lines(axes: Any, layers: Layers, lines: Sequence[tuple[Any, Any]]) -> None:
    """Draw a line per layer, the first ones dark, with a legend short enough to read."""
    # Only to 0.9: the yellow at the end is hard to see on white.
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for each, (x, y), color in zip(layers, lines, colors, strict=True):
        axes.plot(x, y, color=color, label=f"layer {_short(each)}", marker=".")
    shown = axes.get_legend_handles_labels()[0]
    step = math.ceil(len(shown) / _LEGEND_ROWS)
    axes.legend(handles=shown[::step], fontsize=8)


def _expert_columns(axes: Any, values_LE: Array, palette: Palette) -> None:
    """Draw a row per layer and a column for each expert; layers with fewer experts end earlier."""
    draw_cells(axes, values_LE, palette)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _layer_rows(axes: Any, layers: Layers) -> None:
    axes.set_yticks(range(len(layers)), [_short(each) for each in layers])
    _thin(axes.get_yticklabels())
    axes.set_ylabel("layer")


def _thin(labels: Sequence[Any], most: int = 30) -> None:
    """Hide labels that would overlap."""
    step = math.ceil(len(labels) / most)
    for number, label in enumerate(labels):
        label.set_visible(number % step == 0)


def _short(each: LayerReport) -> str:
    return each.layer.removeprefix("layers.")
