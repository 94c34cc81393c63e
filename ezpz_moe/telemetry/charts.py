"""Pictures of expert load, as figures. Import this only to draw: matplotlib is slow to import.

Legend: S = records, in the order of their steps; E = routed experts; L = MoE layers. All pictures
of load share one colour scale, which makes steps, layers and runs comparable: white is even load,
red is more, blue is less, black is a dead expert. Red and blue, and the viridis of the layers, can
be told apart with every common form of colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ezpz_moe.telemetry.figures import coefficient_of_variation, relative_load
from ezpz_moe.telemetry.heat_map import Array, Palette, draw_cells, filled
from ezpz_moe.telemetry.look import DPI, LIGHT, Look, part_of
from ezpz_moe.telemetry.record import LayerRecord, StepRecord
from ezpz_moe.telemetry.summary import steps

WIDTH = 10.0  # inches, for a picture that sets no size
_LARGEST = 30.0  # inches, for all cells of a heat map together
COLUMNS = 400  # of a heat map over steps: no screen shows more
WIDE_FIT = 12  # layers whose panels are so wide; those of more are half as wide
_POINTS = 6000  # of all lines of a picture together: what they take on a page
_FEWEST_POINTS = 100  # of one line

Loads = dict[int, tuple[Array, Array]]
"""By layer, what :func:`load_by_step` returns."""

# Inches around the panels over the steps, and between them.
_LEFT, _RIGHT, _ABOVE, _BELOW, _GAP_W, _GAP_H = 0.85, 0.2, 1.1, 0.6, 0.55, 0.35

# RdBu without its darkest ends, which look like the black of a dead expert.
LOAD = Palette(part_of("RdBu_r", 0.1, 0.9), LogNorm(0.25, 4.0), zero="black")
_PIXELS_WIDE = 1024  # of the loggers' picture, as long as its cells stay visible
_VALUES_FIT = 16  # experts in a row that leave room for a figure in each cell
_NAMES_FIT = 12  # layers in a legend
_DRAWN = 1e100  # larger values are left out: axes cannot be divided beyond the range of numbers
_ROUND: dict[str, Any] = {"integer": True, "min_n_ticks": 1, "steps": [1, 2, 5, 10]}


def load_heat_map(record: StepRecord) -> Figure:
    """Draw the load of each layer (row) and expert (column) in one record.

    For small models each cell shows its figure. Layers may have different numbers of experts.
    """
    load_LE = _loads(record)
    rows, experts = load_LE.shape
    cell_w, cell_h = _cell(experts, 0.6, 0.04, 10.0), _cell(rows, 0.4, 0.1, 6.0)
    size = max(5.0, 1 + experts * cell_w), 2 + rows * cell_h
    # Figure, not pyplot: pyplot keeps every figure in a global list and may want a display.
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw_cells(axes, load_LE, LOAD)
    _name_rows(axes, [layer.layer for layer in record.layers])
    axes.xaxis.set_major_locator(MaxNLocator(min(experts, 16), integer=True, min_n_ticks=1))
    if experts <= _VALUES_FIT and rows <= 4 * _VALUES_FIT:
        _write_values(axes, load_LE)
    axes.set(xlabel="expert", ylabel="layer", title=f"expert load, {steps(record)}")
    place = {"location": "bottom", "shrink": 0.6, "aspect": 40, "pad": 0.1 / size[1]}
    _add_load_bar(figure, [record], ax=axes, **place)
    return figure


def load_pixels(record: StepRecord) -> npt.NDArray[np.uint8]:
    """Draw the same picture for a run's loggers: [H, W, RGB], cells without figures or axes.

    It takes a millisecond; the other one would hold up a training step for most of a second.
    """
    colours_LE3 = (255 * LOAD.rgba(_loads(record))[..., :3]).round().astype(np.uint8)
    size = int(np.clip(_PIXELS_WIDE // colours_LE3.shape[1], 4, 32))
    return colours_LE3.repeat(size, axis=0).repeat(size, axis=1)


def caption(record: StepRecord) -> str:
    """Return what :func:`load_pixels` shows."""
    layers = [layer.layer for layer in record.layers]
    experts = max(len(layer.counts_E) for layer in record.layers)
    return (
        f"expert load, {steps(record)}. Rows: layers {layers[0]} to {layers[-1]}, from above; "
        f"columns: experts 0 to {experts - 1}. White is even, red 4 times the layer's mean, blue "
        "a quarter, black dead."
    )


def load_over_steps(records: Sequence[StepRecord], loads: Loads) -> Figure:
    """Draw a panel per layer, the load of its experts (rows) over the steps (columns).

    ``loads`` are those of :func:`loads_by_step`. A dashed line is where [router] or [balance]
    changed.
    """
    layers = [*loads]
    experts = max(len(load_ES) for load_ES, _ in loads.values())
    columns = 1 if len(layers) <= 6 else 2 if len(layers) <= WIDE_FIT else 4
    rows = math.ceil(len(layers) / columns)
    # At least a pixel per expert, to show a dead one, and room for the title and the axis.
    height = min(6.0, max(1.2, min(2.4, 0.16 * experts), 0.9 + experts / DPI))
    figure = Figure(figsize=(max(WIDTH, 3.6 * columns), rows * height + _ABOVE + _BELOW))
    panels = figure.subplots(
        rows, columns, sharex=True, squeeze=False, gridspec_kw=_grid(figure, rows, columns)
    ).flatten()
    for unused in panels[len(layers) :]:
        unused.remove()
    panels = panels[: len(layers)]
    for panel, layer in zip(panels, layers, strict=True):
        load_ES, edges = loads[layer]
        draw_cells(panel, load_ES, LOAD, edges, first_on_top=False)
        panel.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        panel.xaxis.set_major_locator(MaxNLocator(6, **_ROUND))
        panel.set_title(f"layer {layer}", fontsize="medium", loc="left")
        _mark_changes(panel, records, "black")  # as on every cell, whatever the page
    for lowest in panels[-columns:]:
        lowest.tick_params(labelbottom=True)
    width, height = figure.get_size_inches()
    figure.supxlabel("step", fontsize="medium", y=0.1 / height, va="bottom")
    figure.supylabel("expert", fontsize="medium", x=0.1 / width, ha="left")
    place = figure.add_axes((0.2, 1 - 0.7 / height, 0.6, 0.16 / height))
    _add_load_bar(figure, records, cax=place, orientation="horizontal", ticklocation="top")
    return figure


def _grid(figure: Figure, rows: int, columns: int) -> dict[str, float]:
    """Return where the panels are. A layout by what is drawn takes seconds for dozens of them."""
    width, height = figure.get_size_inches()
    panel_w = (width - _LEFT - _RIGHT - (columns - 1) * _GAP_W) / columns
    panel_h = (height - _ABOVE - _BELOW - (rows - 1) * _GAP_H) / rows
    return {
        "left": _LEFT / width,
        "right": 1 - _RIGHT / width,
        "bottom": _BELOW / height,
        "top": 1 - _ABOVE / height,
        "wspace": _GAP_W / panel_w,
        "hspace": _GAP_H / panel_h,
    }


def cv_over_steps(records: Sequence[StepRecord], cv_LS: Array, look: Look = LIGHT) -> Figure:
    """Draw the CV of every layer's load, and their mean, over the steps.

    ``cv_LS`` is that of :func:`cv_by_step`. With more points than a screen shows, one is the mean
    of several records'.
    """
    layers = layers_of(records)
    groups = _groups(len(records), max(_FEWEST_POINTS, _POINTS // len(layers)))
    steps_S = [records[group[-1]].step for group in groups]
    cv_LS = np.stack([mean_over_rows(cv_LS[:, group].T) for group in groups], axis=1)
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = ScalarMappable(Normalize(layers[0], layers[-1]), look.order)
    # Colour by depth, from light to dark: dozens of layers have no distinct colours, but neighbours
    # look alike.
    colour_L = colours.to_rgba(np.array(layers, dtype=float))
    for layer, cv_S, colour in zip(layers, cv_LS, colour_L, strict=True):
        draw_line(axes, steps_S, cv_S, color=colour, linewidth=1.2, label=f"layer {layer}")
    draw_line(axes, steps_S, mean_over_rows(cv_LS), color=look.ink, linewidth=2.5, label="mean")
    if len(layers) <= _NAMES_FIT:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    else:
        axes.legend(handles=[axes.lines[-1]], frameon=False)
        figure.colorbar(colours, ax=axes, label="layer")
        _name_highest(axes, steps_S, layers, cv_LS)
    name_steps(axes, "CV of load: std / mean")
    _mark_changes(axes, records, look.ink)
    axes.set_ylim(bottom=0)
    return figure


def loss_and_balance(
    records: Sequence[StepRecord], cv_LS: Array, look: Look = LIGHT
) -> Figure | None:
    """Draw loss and mean CV over the steps on two axes, and loss against CV.

    ``cv_LS`` is that of :func:`cv_by_step`. None if no record has a finite loss. A single record
    has no second part.
    """
    steps_S = _steps(records)
    loss_S = _drawable([r.loss for r in records])
    cv_S = mean_over_rows(cv_LS)
    if not np.isfinite(loss_S).any():
        return None
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    has_course = np.isfinite(loss_S + cv_S).sum() > 1
    # Squeezing would return bare axes for a single panel.
    left, *right = figure.subplots(1, 1 + has_course, squeeze=False).flatten()
    twin = left.twinx()
    draw_line(left, steps_S, loss_S, color=look.loss)
    draw_line(twin, steps_S, cv_S, color=look.cv, linestyle="--")
    name_steps(left, "training loss (solid)")
    twin.set_ylabel("mean CV of load (dashed)")
    twin.set_ylim(bottom=0)
    twin.spines["top"].set_visible(False)
    for axes, colour in ((left, look.loss), (twin, look.cv)):
        axes.yaxis.label.set_color(colour)
        axes.tick_params(axis="y", colors=colour)
    for axes in right:
        points = axes.scatter(cv_S, loss_S, c=steps_S, cmap=look.order, s=22, linewidths=0)
        axes.set(xlabel="mean CV of load", ylabel="training loss")
        axes.spines[["top", "right"]].set_visible(False)
        figure.colorbar(points, ax=axes, label="step", ticks=MaxNLocator(6, **_ROUND))
    return figure


def balance_losses(records: Sequence[StepRecord], look: Look = LIGHT) -> Figure | None:
    """Draw each balance loss over the steps, unscaled and averaged over the layers.

    None if no record has any.
    """
    names = sorted({name for r in records for layer in r.layers for name in layer.losses})
    if not names:
        return None
    figure = Figure(figsize=(WIDTH, 0.6 + 2.2 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False).flatten()
    for panel, name in zip(panels, names, strict=True):
        loss_S = _drawable([_mean_loss(record, name) for record in records])
        draw_line(panel, _steps(records), loss_S, color=look.loss)
        name_steps(panel, f"{name}, unscaled", is_lowest=name == names[-1])
    return figure


# Numbers ------------------------------------------------------------------------------------------


def layers_of(records: Sequence[StepRecord]) -> list[int]:
    """Return the numbers of the layers that any record has."""
    return sorted({layer.layer for record in records for layer in record.layers})


def _steps(records: Sequence[StepRecord]) -> list[int]:
    return [record.step for record in records]


def changes(records: Sequence[StepRecord]) -> list[int]:
    """Return the steps after which a resumed run chooses or balances in another way."""
    return [one.step for one, other in pairwise(records) if one.settings != other.settings]


def _layer(record: StepRecord, number: int) -> LayerRecord | None:
    return next((layer for layer in record.layers if layer.layer == number), None)


def _loads(record: StepRecord) -> Array:
    """Return the load of each layer and expert: [L, E], NaN where a layer has fewer experts."""
    return filled([relative_load(layer.counts_E).tolist() for layer in record.layers])


def cv_by_step(records: Sequence[StepRecord]) -> Array:
    """Return each layer's CV by record: [L, S], NaN where a layer has no assignments."""
    found = [[_layer(record, number) for record in records] for number in layers_of(records)]
    return np.array(
        [
            [coefficient_of_variation(one.counts_E) if one else math.nan for one in row]
            for row in found
        ]
    )


def mean_over_rows(values_LS: Array) -> Array:
    """Return the mean of each column's values: of [L, S] it is [S], NaN where there is none."""
    has_LS = np.isfinite(values_LS)
    total_S, number_S = np.where(has_LS, values_LS, 0).sum(axis=0), has_LS.sum(axis=0)
    # Not nanmean, which warns about a column without a value.
    return np.where(number_S, total_S / np.maximum(number_S, 1), math.nan)


def _mean_loss(record: StepRecord, name: str) -> float:
    values = [layer.losses[name] for layer in record.layers if name in layer.losses]
    return sum(values) / len(values) if values else math.nan


def loads_by_step(records: Sequence[StepRecord]) -> Loads:
    """Return each layer's load over the steps, in as many columns as its panel can show."""
    layers = layers_of(records)
    columns = COLUMNS if len(layers) <= WIDE_FIT else COLUMNS // 2
    return {layer: load_by_step(records, layer, columns) for layer in layers}


def load_by_step(records: Sequence[StepRecord], number: int, columns: int) -> tuple[Array, Array]:
    """Return the load of a layer's experts over the steps, in at most ``columns`` columns.

    Returns [E, columns], the assignments in a column's records over their mean, and the columns'
    edges in steps, [columns + 1]: a column ends at the step of its last record.
    """
    found = [(r, layer) for r in records if (layer := _layer(r, number)) is not None]
    experts = max(len(layer.counts_E) for _, layer in found)
    # A resumed run may have another number of experts, which does not fit into the same picture.
    found = [(r, layer) for r, layer in found if len(layer.counts_E) == experts]
    # Sum neighbours instead of skipping records: a short collapse stays visible.
    groups = _groups(len(found), columns)
    first = found[0][0]
    # Edges at steps, not at record numbers: records may cover different numbers of steps.
    edges = [first.step - first.steps, *(found[group[-1]][0].step for group in groups)]
    # float64: a sum of large integers would wrap around to a negative one.
    counts_SE = np.array([layer.counts_E for _, layer in found], dtype=np.float64)
    summed = np.add.reduceat(counts_SE, [group[0] for group in groups], axis=0)
    return np.stack([relative_load(counts_E) for counts_E in summed], axis=1), np.array(edges)


# Drawing ------------------------------------------------------------------------------------------


def _cell(number: int, largest: float, smallest: float, room: float) -> float:
    """Return the size in inches of each of ``number`` cells, which should fit into ``room``."""
    return min(largest, max(smallest, room / number), _LARGEST / number)


def _add_load_bar(figure: Figure, records: Sequence[StepRecord], **place: Any) -> None:
    has_dead = any(
        0 in layer.counts_E and any(layer.counts_E) for r in records for layer in r.layers
    )
    label = f"load: assignments / layer's mean{' (black: dead)' * has_dead}"
    bar = figure.colorbar(LOAD.bar, extend="both", label=label, **place)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["¼", "½", "1", "2", "4"])
    bar.minorticks_off()


def _write_values(axes: Axes, load_LE: Array) -> None:
    for (row, expert), load in np.ndenumerate(load_LE):
        if np.isnan(load):
            continue
        ((red, green, blue, _),) = LOAD.rgba(np.array([load]))
        # Perceived brightness of the cell (the weights are those of ITU-R BT.601).
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        axes.text(
            expert,
            row,
            "dead" if load == 0 else f"{load:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if is_dark else "black",
        )


def _name_rows(axes: Axes, names: Sequence[int]) -> None:
    """Name all rows if there are few, else the round numbers."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if len(names) <= 20 * n or n == 100)
    rows = [row for row, name in enumerate(names) if name % every == 0]
    axes.set_yticks(rows, [str(names[row]) for row in rows])


def _name_highest(axes: Axes, steps_S: Sequence[int], names: list[int], values_LS: Array) -> None:
    """Name the line that ends highest, next to its end."""
    last_L = np.nan_to_num(values_LS[:, -1], nan=-1.0)
    highest = int(last_L.argmax())
    axes.annotate(
        f"layer {names[highest]}",
        (steps_S[-1], last_L[highest]),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
    )


def _mark_changes(axes: Axes, records: Sequence[StepRecord], ink: str) -> None:
    """Draw a line at each of the changes."""
    for step in changes(records):
        axes.axvline(step, color=ink, linestyle=(0, (4, 3)), linewidth=1.2)


def _groups(number: int, most: int) -> list[npt.NDArray[np.int_]]:
    """Split 0 to ``number`` - 1 into at most ``most`` neighbourhoods."""
    return np.array_split(np.arange(number), min(number, most))


def _drawable(values_S: Sequence[float | None]) -> Array:
    """Return the values, NaN where there is none or one that no axis can show."""
    array_S = np.array(values_S, dtype=np.float64)
    return np.where(np.abs(array_S) <= _DRAWN, array_S, math.nan)


def draw_line(axes: Axes, steps_S: Sequence[int], values_S: npt.ArrayLike, **style: Any) -> None:
    """Draw a line; a single value, which makes no line, becomes a point."""
    marker = "o" if np.isfinite(values_S).sum() == 1 else None
    axes.plot(steps_S, values_S, marker=marker, **style)


def name_steps(axes: Axes, label: str, *, is_lowest: bool = True) -> None:
    axes.set_ylabel(label, parse_math=False)
    if is_lowest:
        axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(8, **_ROUND))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
