"""Orders of experts, and what follows from them. Legend: :mod:`ezpz_moe.tools.placement`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def settled(bins_BC: Ints) -> Ints:
    """Return the order that puts bin b's items at the places b C to (b + 1) C - 1: [B C].

    An item that is there already keeps its place, and the others fill the gaps in their own order:
    as few as possible move.
    """
    order = np.full(bins_BC.size, -1)
    places_BC = np.arange(bins_BC.size).reshape(bins_BC.shape)
    for items_C, places_C in zip(bins_BC, places_BC, strict=True):
        stay = np.intersect1d(items_C, places_C)
        order[stay] = stay
        order[np.setdiff1d(places_C, stay)] = np.setdiff1d(items_C, stay)
    return order


def whole_groups(order_G: Ints, size: int) -> Ints:
    """Return the order of experts that moves whole groups of ``size`` neighbours: [G size]."""
    experts: Ints = (order_G[:, None] * size + np.arange(size)).reshape(-1)
    return experts


def side_by_side(orders_XI: Ints) -> Ints:
    """Return one order of X I items, X segments of neighbours each ordered by itself."""
    items = orders_XI.shape[1]
    one: Ints = (orders_XI + items * np.arange(len(orders_XI))[:, None]).reshape(-1)
    return one


def rank_loads(loads_XE: Floats, ranks: int) -> Floats:
    """Return what each rank of equally many neighbours has: [..., R]."""
    of_ranks: Floats = loads_XE.reshape(*loads_XE.shape[:-1], ranks, -1).sum(-1)
    return of_ranks


def moved(order_E: Ints, ranks: int) -> int:
    """Return how many experts come to another rank."""
    per_rank = len(order_E) // ranks
    return int((order_E // per_rank != np.arange(len(order_E)) // per_rank).sum())
