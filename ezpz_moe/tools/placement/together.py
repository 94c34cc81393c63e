"""Orders that bring experts onto one node which tokens choose together.

To divide a weighted graph's vertices into equal parts with the most weight inside them is balanced
graph partitioning, which is NP-hard. Here two items of different nodes change places, those first
from whose exchange the most is gained: a step of Kernighan and Lin's method (1970).

Legend: :mod:`ezpz_moe.tools.placement`; P = places, one for each item, S = places of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ezpz_moe.tools.placement.orders import Floats, Ints, rank_loads, settled, whole_groups

_ROUNDS = 8  # of exchanging ranks, and then items within the limit; it ends before that by itself


def together_order(pairs_II: Floats, nodes: int) -> Ints:
    """Return an order [I] with as much weight inside the nodes as can be found.

    Starts from the order that is there.

    Args:
        pairs_II: weight of each two items, symmetric, with zeros on the diagonal.
        nodes: N, a divisor of I.
    """
    order_P = _exchanged(pairs_II, np.arange(len(pairs_II)), nodes)
    return settled(order_P.reshape(nodes, -1))


def together_within(
    pairs_II: Floats, loads_I: Floats, order_I: Ints, ranks: int, nodes: int, limit: float
) -> Ints:
    """Return an order with more weight inside the nodes, and no rank above the limit.

    Args:
        pairs_II: as in :func:`together_order`.
        loads_I: what each item has.
        order_I: whose ranks are within the limit.
        ranks: R, a multiple of N and a divisor of I.
        limit: what a rank may have.
    """
    best_P = order_I
    for _ in range(_ROUNDS):
        before_P = best_P
        pairs_PP = pairs_II[np.ix_(best_P, best_P)]
        pairs_RR = between(pairs_PP, ranks)
        np.fill_diagonal(pairs_RR, 0)
        # Whole ranks keep their loads.
        ranks_R = together_order(pairs_RR, nodes)
        best_P = best_P[whole_groups(ranks_R, len(best_P) // ranks)]
        best_P = _exchanged(pairs_II, best_P, nodes, _Limit(loads_I, ranks, limit))
        if (best_P == before_P).all():
            break
    return settled(best_P.reshape(ranks, -1))


def weight_inside(pairs_II: Floats, order_I: Ints, nodes: int) -> float:
    """Return the weight of the pairs on one node, each pair once."""
    pairs_PP = pairs_II[np.ix_(order_I, order_I)]
    return float(between(pairs_PP, nodes).trace()) / 2


def between(pairs_PP: Floats, bins: int) -> Floats:
    """Return the weight between any two ranks or nodes of neighbouring places: [B, B].

    Inside of one, each pair counts twice.
    """
    per_bin = len(pairs_PP) // bins
    between_BB: Floats = pairs_PP.reshape(bins, per_bin, bins, per_bin).sum((1, 3))
    return between_BB


@dataclass(frozen=True)
class _Limit:
    """The most that one of the ranks may have, and what each item has."""

    loads_I: Floats
    ranks: int
    most: float

    def allows(self, order_P: Ints) -> npt.NDArray[np.bool_]:
        """Return which two places may change their items: [P, P]."""
        loads_P = self.loads_I[order_P]
        of_rank_P = rank_loads(loads_P, self.ranks).repeat(len(order_P) // self.ranks)
        # A place's rank gives its item for that of the other place.
        after_PP = of_rank_P[:, None] - loads_P[:, None] + loads_P
        fits_PP = after_PP <= self.most
        return fits_PP & fits_PP.T


def _exchanged(pairs_II: Floats, order_P: Ints, nodes: int, limit: _Limit | None = None) -> Ints:
    """Exchange items of two nodes until no exchange brings more weight inside nodes."""
    order_P = order_P.copy()
    per_node = len(order_P) // nodes
    # What is gained must not be rounding, or two items would change places for ever.
    least = 1e-9 * pairs_II.sum()
    pairs_PP = pairs_II[np.ix_(order_P, order_P)]
    while True:
        gain_PP = _gains(pairs_PP, nodes)
        if limit:
            gain_PP = np.where(limit.allows(order_P), gain_PP, -np.inf)
        gain_NSNS = gain_PP.reshape(nodes, per_node, nodes, per_node)
        pairs_of_nodes = _apart(gain_NSNS.max((1, 3)), least)
        if not pairs_of_nodes:
            return order_P
        for one, other in pairs_of_nodes:
            s, t = divmod(int(gain_NSNS[one, :, other].argmax()), per_node)
            two = [one * per_node + s, other * per_node + t]
            order_P[two] = order_P[two[::-1]]
            pairs_PP[two] = pairs_PP[two[::-1]]
            pairs_PP[:, two] = pairs_PP[:, two[::-1]]


def _gains(pairs_PP: Floats, nodes: int) -> Floats:
    """Return how much comes inside nodes when the items of two places are exchanged: [P, P]."""
    to_node_PN = rank_loads(pairs_PP, nodes)
    # From a place's item to the node of the other place, less what it has to its own.
    gained_PP = to_node_PN.repeat(len(pairs_PP) // nodes, axis=1)
    gained_PP -= gained_PP.diagonal()[:, None].copy()
    # The two are counted as if each had come to the other one.
    gain_PP: Floats = gained_PP + gained_PP.T - 2 * pairs_PP
    return gain_PP


def _apart(gain_NN: Floats, least: float) -> list[tuple[int, int]]:
    """Return pairs of nodes with the highest gains, no node in two of them.

    What is gained between two nodes does not depend on what others exchange.
    """
    pairs: list[tuple[int, int]] = []
    gain_NN = np.triu(gain_NN, 1)
    while gain_NN.max() > least:
        one, other = divmod(int(gain_NN.argmax()), len(gain_NN))
        pairs.append((one, other))
        gain_NN[[one, other]] = gain_NN[:, [one, other]] = 0
    return pairs
