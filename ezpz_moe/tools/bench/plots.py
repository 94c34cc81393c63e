"""Draw a comparison: bars per shape, and time and memory over skew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ezpz_moe.tools.bench.results import DENSE, Measured

_DPI = 130
_MIB = 2**20
_TALLEST = 3.0  # times the middle one: what is above would make lines of the others
_LAYERS = {"experts": "expert", "routed": "routed"}

Colors = Mapping[str, Any]


def draw(results: Sequence[Measured], file: Path) -> list[Path]:
    """Draw into ``file``; with several dtypes or allocators, into one file for each.

    Returns:
        The files.
    """
    kinds = list(dict.fromkeys((each.dtype, each.allocator) for each in results))
    files = []
    for dtype, allocator in kinds:
        chosen = [each for each in results if (each.dtype, each.allocator) == (dtype, allocator)]
        name = file if len(kinds) == 1 else file.with_stem(f"{file.stem}-{dtype}-{allocator}")
        figure = _picture(chosen)
        # Agg needs no display, and unlike pyplot it does not keep the figure.
        FigureCanvasAgg(figure)
        figure.savefig(name, dpi=_DPI)
        files.append(name)
    return files


def _picture(results: Sequence[Measured]) -> Figure:
    """Draw bars on top; below, for every shape with several routings, two pictures over skew."""
    by_shape: dict[str, list[Measured]] = {}
    for each in results:
        by_shape.setdefault(each.shape.name, []).append(each)
    skewed = {name: sorted(them, key=_skew) for name, them in by_shape.items() if len(them) > 1}
    # One colour for a contender in all pictures, even where some of them lack it.
    names = list(dict.fromkeys(name for each in results for name in each.figures))
    # The ten colours are easier to tell apart than the twenty.
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colors = {name: palette[number % len(palette)] for number, name in enumerate(names)}

    # Inches: 4.6 for the bars, 4.2 for each pair of pictures over skew.
    figure = Figure(figsize=(13, 4.6 + 4.2 * len(skewed)), layout="constrained")
    parts = figure.subfigures(1 + len(skewed), 1, squeeze=False)[:, 0]
    _bars(parts[0].subplots(), [min(them, key=_skew) for them in by_shape.values()], colors)
    for part, (name, them) in zip(parts[1:], skewed.items(), strict=True):
        left, right = part.subplots(1, 2)
        _against_skew(left, them, colors, lambda figures: figures.median())
        left.set(title=f"{name}: time against skew", ylabel="forward and backward, ms")
        _against_skew(right, them, colors, lambda figures: (figures.peak_bytes or np.nan) / _MIB)
        right.set(title=f"{name}: peak memory against skew", ylabel="MiB beyond inputs and weights")
    first = results[0]
    figure.suptitle(
        f"One {_LAYERS[first.layer]} layer on {first.device}, {first.dtype}, {_allocator(first)}"
    )
    handles, labels = _all_handles(figure)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


def _bars(axes: Any, results: Sequence[Measured], colors: Colors) -> None:
    """Draw time as a multiple of the dense FFN's, or milliseconds if that was not measured."""
    by_limit = all(DENSE in each.figures for each in results)
    names = [name for name in colors if not (by_limit and name == DENSE)]
    # Shapes are 1 apart: what the bars leave of that is the gap between two shapes.
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        heights = [_height(each, name, by_limit) for each in results]
        left = np.arange(len(results)) - 0.4 + (number + 0.5) * width
        bars = axes.bar(left, heights, width=0.92 * width, color=colors[name], label=name)
        axes.bar_label(bars, fmt=_short, fontsize=8, padding=2)
    # The bars show each shape's most even routing, and shapes may differ in that.
    routings = {each.routing for each in results}
    shared = f", {routings.pop()}" if len(routings) == 1 else ""
    if by_limit:
        # Above the bars, which would cover it.
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--", zorder=3)
    axes.margins(y=0.12)
    _from_zero(axes)
    axes.set(
        title=f"Forward and backward{shared}",
        ylabel="x the time of one dense FFN" if by_limit else "ms",
    )
    axes.set_xticks(range(len(results)), [f"{e.shape.name}\n{_sizes(e)}" for e in results])


def _against_skew(axes: Any, results: Sequence[Measured], colors: Colors, value: Any) -> None:
    """Draw a line per contender, over the routings from even to uneven."""
    drawn = []
    for name, color in colors.items():
        heights = [
            value(each.figures[name]) if name in each.figures else np.nan for each in results
        ]
        # Dashed: a limit, not a way to compute the layer.
        style = {"linestyle": "--"} if name == DENSE else {"marker": "o", "markersize": 4}
        axes.plot(range(len(results)), heights, color=color, label=name, **style)
        drawn += [(place, height, color) for place, height in enumerate(heights)]
    _from_zero(axes)
    _cut(axes, drawn)
    axes.grid(axis="y", alpha=0.3)
    labels = [f"{each.routing}\n{each.skew:.3g}x" for each in results]
    axes.set_xticks(range(len(results)), labels)
    axes.set_xlabel("routing, and the busiest expert's rows as a multiple of the mean")


def _from_zero(axes: Any) -> None:
    """Begin at zero: twice as long, or twice as high, is twice as much."""
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")


def _cut(axes: Any, drawn: Sequence[tuple[int, float, Any]]) -> None:
    """Cut off what is far above the rest, and write its height: the rest has to be told apart."""
    top = _TALLEST * float(np.nanmedian([height for _, height, _ in drawn] or [np.nan]))
    beyond = [each for each in drawn if each[1] > top]
    if not beyond:
        return
    axes.set_ylim(top=top)
    places = [place for place, _, _ in beyond]
    for number, (place, height, color) in enumerate(beyond):
        above = places[:number].count(place)  # those that are written there already
        axes.annotate(
            f"{height:,.0f} ↑",
            (place, top),
            xytext=(0, -4 - 12 * above),
            textcoords="offset points",
            ha="right" if place else "left",
            va="top",
            color=color,
        )


def _height(measured: Measured, name: str, by_limit: bool) -> float:
    if name not in measured.figures:
        return np.nan
    ratio = measured.time_ratio(name, DENSE) if by_limit else measured.figures[name].median()
    # matplotlib leaves out what is NaN.
    return np.nan if ratio is None else ratio


def _all_handles(figure: Figure) -> tuple[list[Any], list[str]]:
    """Return each contender once, whichever picture shows it."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _sizes(measured: Measured) -> str:
    E, D, F, R = measured.shape.sizes
    return f"E={E} D={D} F={F} R={R}"


def _allocator(measured: Measured) -> str:
    return f"allocator {measured.allocator}"


def _skew(measured: Measured) -> float:
    return measured.skew


def _short(height: float) -> str:
    return "" if np.isnan(height) else f"{height:.2g}"
