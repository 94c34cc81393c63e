"""The order of a layer's experts, whose groups of a limited choice stay together.

A router that chooses groups first scores them as wholes, so experts move only inside their group,
and groups as wholes. Legend: :mod:`ezpz_moe.tools.placement`; G = groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ezpz_moe.tools.placement.even import even_order
from ezpz_moe.tools.placement.orders import Floats, Ints, rank_loads, side_by_side, whole_groups
from ezpz_moe.tools.placement.together import between, together_order, together_within

By = Literal["load", "affinity", "both"]

SLACK = 0.02
"""With ``both``: how much more than with ``load`` the busiest rank may have, as a share of it."""


@dataclass(frozen=True)
class Grid:
    """Where a layer's experts can be.

    Attributes:
        experts: E.
        ranks: R of expert parallelism, each with E / R neighbouring experts.
        ranks_per_node: how many neighbouring ranks are one node.
        groups: of neighbouring experts among which a token's choice is limited; 1: there is no
            limit.
    """

    experts: int
    ranks: int
    ranks_per_node: int
    groups: int = 1

    @property
    def nodes(self) -> int:
        return self.ranks // self.ranks_per_node

    def why_not(self) -> Iterator[str]:
        """Yield what does not fit, in words that follow the name of a layer."""
        if self.experts % self.ranks:
            yield f"has {self.experts} experts, which {self.ranks} ranks cannot share equally"
        elif self.groups > 1:
            group = self.experts // self.groups
            for what, number in (("rank", self.ranks), ("node", self.nodes)):
                size = self.experts // number
                if size % group and group % size:
                    yield (
                        f"has groups of {group} experts and {size} experts on a {what}: a group "
                        f"would be cut, and experts leave no group. Choose ranks so that one of "
                        "the two numbers divides the other"
                    )

    @property
    def has_wide_ranks(self) -> bool:
        """Whether a rank has several whole groups."""
        return self.groups > self.ranks

    @property
    def has_wide_nodes(self) -> bool:
        """Whether a node has several whole groups."""
        return self.groups > self.nodes


def even_orders(loads_LE: Floats, grid: Grid) -> Ints:
    """Return for each layer the order with which its busiest rank has the least: [L, E].

    Args:
        loads_LE: assignments to each expert.
    """
    layers, experts = loads_LE.shape
    if grid.has_wide_ranks:
        size = experts // grid.groups
        orders_LG = even_order(rank_loads(loads_LE, grid.groups), grid.ranks)
        return np.stack([whole_groups(order_G, size) for order_G in orders_LG])
    orders = even_order(loads_LE.reshape(layers * grid.groups, -1), grid.ranks // grid.groups)
    return np.stack([side_by_side(each) for each in orders.reshape(layers, grid.groups, -1)])


def order_with_pairs(loads_E: Floats, pairs_EE: Floats, grid: Grid, by: By) -> Ints:
    """Return the order of a layer [E] with which many pairs are on one node.

    Args:
        loads_E: assignments to each expert.
        pairs_EE: how often a token chooses two experts together; symmetric, with zeros on the
            diagonal.
        by: "affinity": as many pairs as can be found, and then even ranks inside nodes. "both": as
            many as can be found while no rank has more than :data:`SLACK` above what the busiest
            has by load alone.
    """
    size = grid.experts // grid.groups
    if not grid.has_wide_nodes:
        parts = grid.ranks // grid.groups, grid.nodes // grid.groups
        segments = np.arange(grid.experts).reshape(grid.groups, -1)
        return side_by_side(
            np.stack([_order(loads_E[i], pairs_EE[np.ix_(i, i)], *parts, by) for i in segments])
        )
    pairs_GG = between(pairs_EE, grid.groups)
    np.fill_diagonal(pairs_GG, 0)  # inside of a group they are on one node anyway
    if grid.has_wide_ranks:
        loads_G = rank_loads(loads_E, grid.groups)
        return whole_groups(_order(loads_G, pairs_GG, grid.ranks, grid.nodes, by), size)
    # A group's ranks stay together, so which node it is on changes no rank's load.
    inside_E = even_orders(loads_E[None], grid)[0]
    return inside_E[whole_groups(together_order(pairs_GG, grid.nodes), size)]


def _order(loads_I: Floats, pairs_II: Floats, ranks: int, nodes: int, by: By) -> Ints:
    if by == "both":
        even_I = even_order(loads_I[None], ranks)[0]
        limit = float(rank_loads(loads_I[even_I], ranks).max()) * (1 + SLACK)
        return together_within(pairs_II, loads_I, even_I, ranks, nodes, limit)
    nodes_I = together_order(pairs_II, nodes)
    orders_NI = even_order(loads_I[nodes_I].reshape(nodes, -1), ranks // nodes)
    return nodes_I[side_by_side(orders_NI)]
