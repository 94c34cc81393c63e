"""Orders for all layers of a run, and the loads that are expected of them.

Legend: :mod:`ezpz_moe.tools.placement`. Expected is what the window's records would have had in
that order: nothing else is known of the steps to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.placement.even import least_possible
from ezpz_moe.tools.placement.layer import By, Grid, even_orders, order_with_pairs
from ezpz_moe.tools.placement.orders import Floats, Ints, moved, rank_loads
from ezpz_moe.tools.placement.together import weight_inside
from ezpz_moe.tools.placement.window import LayerWindow, Window

Progress = Callable[[Sequence[LayerWindow]], Iterable[LayerWindow]]


@dataclass(frozen=True)
class Aim:
    """What a placement is for.

    Attributes:
        ranks: of expert parallelism.
        ranks_per_node: neighbouring ranks of a node; None if nodes do not matter.
        by: what is improved.
        min_gain: a layer that gains less keeps its order.
    """

    ranks: int
    ranks_per_node: int | None
    by: By
    min_gain: float

    def grid(self, experts: int, groups: int) -> Grid:
        return Grid(experts, self.ranks, self.ranks_per_node or self.ranks, groups)


@dataclass(frozen=True)
class Load:
    """What ranks get of a layer.

    Attributes:
        max_over_mean: assignments of the busiest rank over the mean of the ranks, in all records
            together; None if nothing was assigned.
        max_over_mean_of_records: the same with the busiest rank of each record, which not always is
            the same one: a step waits for that one.
        rows: assignments of the busiest ranks of the records, per step.
        busiest: the number of the rank that is the busiest in all records together.
        of_ranks: each rank's assignments over their mean: [R].
        pairs_on_node: of the pairs in the records, the share whose experts are on one node; None
            without pairs or nodes.
    """

    max_over_mean: float | None
    max_over_mean_of_records: float | None
    rows: float
    busiest: int
    of_ranks: tuple[float, ...]
    pairs_on_node: float | None


@dataclass(frozen=True)
class LayerPlacement:
    """A layer's order: the new expert i is the old expert ``order[i]``.

    Attributes:
        moved: how many experts come to another rank.
        least: max over mean that no order is below, of experts in one group.
    """

    layer: int
    experts: int
    moved: int
    before: Load
    after: Load
    least: float | None
    order: tuple[int, ...]


@dataclass(frozen=True)
class HeldOut:
    """What orders by load from the first half of the records do in the second: rows per step.

    Attributes:
        before: in the order that was there.
        after: in the order that the first half asks for.
        best: in the order that the second half itself asks for.
    """

    before: float
    after: float
    best: float


@dataclass(frozen=True)
class Placement:
    """The orders of all layers; the two numbers are rows of the busiest ranks of a step."""

    layers: tuple[LayerPlacement, ...]
    before: float
    after: float
    held_out: HeldOut | None

    @property
    def order(self) -> dict[int, tuple[int, ...]]:
        """The orders of the layers that do not keep theirs."""
        return {each.layer: each.order for each in self.layers if each.moved}


def place(
    window: Window, groups: Mapping[int, int], aim: Aim, progress: Progress = iter
) -> Placement:
    """Return an order for each layer of the window.

    Args:
        groups: by layer, as in :class:`~.layer.Grid`.
        progress: is given the layers.

    Raises:
        EzpzError: a layer's experts do not fit the ranks; or pairs are asked for that the records
            do not have.
    """
    for layer in window.layers:
        for reason in aim.grid(layer.experts, groups[layer.number]).why_not():
            raise EzpzError(f"{window.source}: layer {layer.number} {reason}.")
    if aim.by != "load" and not window.has_pairs:
        raise EzpzError(
            f"{window.source}: --by {aim.by} needs pairs of experts that tokens choose together, "
            "and its records have none. Set [telemetry] pairs = 1024 in the flavor and train on, "
            "or use --by load."
        )
    layers = _placed(window, groups, aim, progress)
    return Placement(tuple(layers), *_rows(layers), _held_out(window, groups, aim))


def _placed(
    window: Window, groups: Mapping[int, int], aim: Aim, progress: Progress = iter
) -> list[LayerPlacement]:
    orders = _orders(window.layers, groups, aim, progress)
    placed = []
    for layer, order_E in zip(window.layers, orders, strict=True):
        grid = aim.grid(layer.experts, groups[layer.number])
        has_nodes = aim.ranks_per_node is not None
        one = _compared(layer, sum(window.steps_W), grid, order_E, has_nodes)
        if _gain(one, aim.by) < aim.min_gain:
            one = replace(one, moved=0, after=one.before, order=tuple(range(layer.experts)))
        placed.append(one)
    return placed


def _orders(
    layers: Sequence[LayerWindow], groups: Mapping[int, int], aim: Aim, progress: Progress
) -> list[Ints]:
    if aim.by != "load":
        return [
            order_with_pairs(
                layer.counts_WE.sum(0),
                np.zeros((layer.experts,) * 2) if layer.pairs_EE is None else layer.pairs_EE,
                aim.grid(layer.experts, groups[layer.number]),
                aim.by,
            )
            for layer in progress(layers)
        ]
    # All layers with equally many experts and groups at once, which is many times faster.
    of_grid: dict[Grid, list[int]] = {}
    for place, layer in enumerate(layers):
        of_grid.setdefault(aim.grid(layer.experts, groups[layer.number]), []).append(place)
    orders: dict[int, Ints] = {}
    for grid, places in of_grid.items():
        loads_LE = np.stack([layers[place].counts_WE.sum(0) for place in places])
        orders |= dict(zip(places, even_orders(loads_LE, grid), strict=True))
    return [orders[place] for place in range(len(layers))]


def _compared(
    layer: LayerWindow, steps: int, grid: Grid, order_E: Ints, has_nodes: bool
) -> LayerPlacement:
    """Return the layer in its order and in the new one."""
    nodes = grid.nodes if has_nodes else None
    before, after = (
        _load(layer, steps, order, grid.ranks, nodes)
        for order in (np.arange(layer.experts), order_E)
    )
    total = layer.counts_WE.sum()
    least = least_possible(layer.counts_WE.sum(0)[None], grid.ranks)[0] * grid.ranks
    return LayerPlacement(
        layer=layer.number,
        experts=layer.experts,
        moved=moved(order_E, grid.ranks),
        before=before,
        after=after,
        least=float(least / total) if total else None,
        order=tuple(order_E.tolist()),
    )


def _load(layer: LayerWindow, steps: int, order_E: Ints, ranks: int, nodes: int | None) -> Load:
    loads_WR = rank_loads(layer.counts_WE[:, order_E], ranks)
    loads_R, busiest_W = loads_WR.sum(0), loads_WR.max(1)
    mean = float(loads_R.mean())
    return Load(
        max_over_mean=float(loads_R.max() / mean) if mean else None,
        max_over_mean_of_records=float(busiest_W.sum() / mean) if mean else None,
        rows=float(busiest_W.sum() / steps),
        busiest=int(loads_R.argmax()),
        of_ranks=tuple((loads_R / mean).tolist()) if mean else (),
        pairs_on_node=_share_inside(layer.pairs_EE, order_E, nodes),
    )


def _share_inside(pairs_EE: Floats | None, order_E: Ints, nodes: int | None) -> float | None:
    if pairs_EE is None or nodes is None:
        return None
    return weight_inside(pairs_EE, order_E, nodes) / (pairs_EE.sum() / 2)


def _gain(layer: LayerPlacement, by: By) -> float:
    """Return what the order gains: a share of the busiest ranks' rows, or of the pairs."""
    before, after = layer.before, layer.after
    of_rows = 1 - after.rows / before.rows if before.rows else 0.0
    of_pairs = (after.pairs_on_node or 0.0) - (before.pairs_on_node or 0.0)
    return {"load": of_rows, "affinity": of_pairs, "both": max(of_rows, of_pairs)}[by]


def _rows(layers: Sequence[LayerPlacement]) -> tuple[float, float]:
    """Return the rows of the busiest ranks of a step, before and after, of all layers together."""
    return sum(each.before.rows for each in layers), sum(each.after.rows for each in layers)


def _held_out(window: Window, groups: Mapping[int, int], aim: Aim) -> HeldOut | None:
    """Return what an order is worth in steps that it does not come from; None of one record."""
    if not (middle := len(window.steps_W) // 2):
        return None
    by_load = replace(aim, by="load")
    first, second = window.part(slice(middle)), window.part(slice(middle, None))
    steps = sum(second.steps_W)
    after = sum(
        _load(layer, steps, np.array(placed.order), aim.ranks, None).rows
        for layer, placed in zip(second.layers, _placed(first, groups, by_load), strict=True)
    )
    before, best = _rows(_placed(second, groups, by_load))
    return HeldOut(before, after, best)
