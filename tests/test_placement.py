"""Orders of experts: even ranks, against all ways to divide them, and pairs on one node."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ezpz_moe.tools.placement.even import PRECISION, even_order, least_possible
from ezpz_moe.tools.placement.layer import SLACK, Grid, even_orders, order_with_pairs
from ezpz_moe.tools.placement.orders import moved, rank_loads
from ezpz_moe.tools.placement.together import weight_inside


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def busiest(loads_E, order_E, ranks: int) -> float:
    return max(
        sum(loads_E[expert] for expert in rank)
        for rank in np.asarray(order_E).reshape(ranks, -1).tolist()
    )


def best_of_all(loads: list[float], size: int) -> float:
    """The least largest sum over all ways to divide the loads into sets of this size."""
    if len(loads) == size:
        return sum(loads)
    first, *rest = range(len(loads))
    return min(
        max(
            loads[first] + sum(loads[i] for i in others),
            best_of_all([loads[i] for i in rest if i not in others], size),
        )
        for others in combinations(rest, size - 1)
    )


def greedy(loads_E, ranks: int) -> float:
    """The busiest rank where the highest load goes to the idlest rank with a place."""
    sums, places = [0.0] * ranks, [len(loads_E) // ranks] * ranks
    for load in sorted(loads_E, reverse=True):
        rank = min((r for r in range(ranks) if places[r]), key=sums.__getitem__)
        sums[rank] += load
        places[rank] -= 1
    return max(sums)


@st.composite
def small(draw):
    ranks = draw(st.integers(1, 3))
    per_rank = draw(st.integers(1, 10 // ranks))
    load = st.one_of(st.integers(0, 20), st.integers(0, 10**6))
    return ranks, draw(st.lists(load, min_size=ranks * per_rank, max_size=ranks * per_rank))


@given(small())
@settings(max_examples=150, deadline=None)
def test_few_experts_are_as_even_as_any_way_makes_them(case):
    ranks, loads = case
    order = even_order(np.array([loads], dtype=float), ranks)[0]
    best = best_of_all(loads, len(loads) // ranks)
    assert sorted(order.tolist()) == list(range(len(loads)))
    assert best <= busiest(loads, order, ranks) <= best * (1 + PRECISION)


@given(small())
@settings(max_examples=80, deadline=None)
def test_no_way_is_below_the_least_possible(case):
    ranks, loads = case
    least = least_possible(np.array([loads], dtype=float), ranks)[0]
    # A sum's rounding, of at most ten numbers.
    assert least <= best_of_all(loads, len(loads) // ranks) * (1 + 1e-14)


@pytest.mark.parametrize(("experts", "ranks"), [(256, 64), (64, 8), (60, 4), (36, 12), (16, 16)])
def test_every_rank_has_its_experts_and_none_has_more_than_the_busiest_before(rng, experts, ranks):
    loads_LE = rng.lognormal(0, 0.8, (3, experts))
    for loads_E, order_E in zip(loads_LE, even_order(loads_LE, ranks), strict=True):
        assert sorted(order_E.tolist()) == list(range(experts))
        assert busiest(loads_E, order_E, ranks) <= busiest(loads_E, range(experts), ranks)


@pytest.mark.parametrize(("experts", "ranks"), [(64, 8), (256, 8), (256, 64)])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.2])
def test_under_zipf_loads_it_reaches_what_is_possible(rng, experts, ranks, exponent):
    loads_LE = rng.permuted(np.arange(1, experts + 1.0)[None].repeat(2, 0) ** -exponent, axis=1)
    orders_LE = even_order(loads_LE, ranks)
    least_L = least_possible(loads_LE, ranks)
    for loads_E, order_E, least in zip(loads_LE, orders_LE, least_L, strict=True):
        ours = busiest(loads_E, order_E, ranks)
        assert ours <= least * (1 + PRECISION) * (1 + 1e-12)
        assert ours <= greedy(loads_E, ranks) * (1 + PRECISION)
        # Not only the busiest: another one may be it in the next step. Here one expert alone has
        # more than a rank's share, and the other ranks can be at the mean.
        if (experts, ranks, exponent) == (256, 8, 1.0):
            *others, _ = sorted(rank_loads(loads_E[order_E], ranks))
            assert others[-1] <= loads_E.sum() / ranks * (1 + PRECISION)


def test_where_greedy_is_far_from_even_this_is_not(rng):
    loads_LE = rng.permuted(np.arange(1, 65.0)[None].repeat(8, 0) ** -0.5, axis=1)
    ours = [busiest(*each, 8) for each in zip(loads_LE, even_order(loads_LE, 8), strict=True)]
    theirs = [greedy(loads_E, 8) for loads_E in loads_LE]
    assert max(ours) < 0.95 * min(theirs)


def test_local_optima_are_left(rng):
    # Exchanges of two ranks alone end at 1.008 on the average.
    loads_LE = rng.uniform(0.5, 1.5, (12, 36))
    orders_LE = even_order(loads_LE, 12)
    busiest_L = [busiest(*each, 12) for each in zip(loads_LE, orders_LE, strict=True)]
    assert np.mean(busiest_L / loads_LE.sum(1) * 12) < 1.006


def test_equal_loads_keep_their_order():
    for loads in (np.ones((2, 64)), np.zeros((2, 64)), np.tile([3.0, 1.0], (2, 32))):
        assert (even_order(loads, 8) == np.arange(64)).all()


def test_one_exchange_that_evens_everything_moves_two_experts():
    loads = np.tile([1.0, 2.0, 3.0, 4.0], 16)
    loads[[0, 63]] = 4, 1  # the first rank has 3 too many, the last 3 too few
    order = even_order(loads[None], 16)[0]
    assert np.flatnonzero(order != np.arange(64)).tolist() == [0, 60]
    assert moved(order, 16) == 2


def test_an_expert_that_stays_on_its_rank_keeps_its_place(rng):
    loads_E = rng.lognormal(0, 0.5, 32)
    order_E = even_order(loads_E[None], 4)[0]
    stays = order_E // 8 == np.arange(32) // 8
    assert (order_E[stays] == np.arange(32)[stays]).all()
    assert moved(order_E, 4) == (~stays).sum() > 0


def test_the_order_depends_on_the_shape_of_the_loads_alone(rng):
    loads_LE = rng.uniform(0.5, 1.5, (3, 24))
    together = even_order(loads_LE, 8)
    assert (even_order(loads_LE, 8) == together).all()
    assert (even_order(loads_LE * 1024, 8) == together).all()
    assert (even_order(loads_LE[1:2], 8) == together[1:2]).all()


# Groups -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "per_node", "groups"),
    [(8, 8, 1), (8, 2, 2), (8, 4, 8), (4, 2, 8), (16, 2, 4), (8, 8, 8)],
)
@pytest.mark.parametrize("by", ["load", "affinity", "both"])
def test_experts_leave_no_group_and_no_group_is_cut(rng, ranks, per_node, groups, by):
    grid = Grid(32, ranks, per_node, groups)
    assert not list(grid.why_not())
    loads_E, pairs_EE = rng.lognormal(0, 0.5, 32), symmetric(rng, 32)
    order_E = (
        even_orders(loads_E[None], grid)[0]
        if by == "load"
        else order_with_pairs(loads_E, pairs_EE, grid, by)
    )
    assert sorted(order_E.tolist()) == list(range(32))
    size = 32 // groups
    for group in order_E.reshape(groups, size):
        assert len(set((group // size).tolist())) == 1
    if by != "affinity":  # which may give a rank more
        assert busiest(loads_E, order_E, ranks) <= busiest(loads_E, range(32), ranks) * (1 + SLACK)
    if by == "affinity":
        before = weight_inside(pairs_EE, np.arange(32), grid.nodes)
        assert weight_inside(pairs_EE, order_E, grid.nodes) >= before


def test_whole_groups_go_where_ranks_hold_several():
    # Groups of 2 whose loads are 8, 8, 1, 1, 1, 1, 8, 8 on 4 ranks of 2 groups.
    loads_E = np.repeat([4.0, 4, 0.5, 0.5, 0.5, 0.5, 4, 4], 2)
    order_E = even_orders(loads_E[None], Grid(16, 4, 4, 8))[0]
    assert rank_loads(loads_E[order_E], 4).tolist() == [9, 9, 9, 9]


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (Grid(60, 8, 8), "has 60 experts, which 8 ranks cannot share equally"),
        (Grid(160, 10, 10, 8), "has groups of 20 experts and 16 experts on a rank"),
        (Grid(96, 24, 8, 4), "has groups of 24 experts and 32 experts on a node"),
    ],
)
def test_what_does_not_fit_is_told(grid, told):
    (reason,) = grid.why_not()
    assert told in reason


# Pairs --------------------------------------------------------------------------------------------


def symmetric(rng, experts: int):
    pairs = np.triu(rng.integers(0, 50, (experts, experts)).astype(float), 1)
    return pairs + pairs.T


def clustered(rng, experts: int, clusters: int):
    """Return pairs, most of them inside a cluster, and the cluster of each expert."""
    cluster_E = rng.permutation(np.arange(experts) % clusters)
    pairs_EE = symmetric(rng, experts) + 200 * (cluster_E[:, None] == cluster_E)
    np.fill_diagonal(pairs_EE, 0)
    return pairs_EE, cluster_E


@pytest.mark.parametrize(("experts", "nodes"), [(64, 4), (64, 8), (32, 2), (128, 4)])
def test_experts_that_are_chosen_together_come_to_one_node(rng, experts, nodes):
    pairs_EE, cluster_E = clustered(rng, experts, nodes)
    grid = Grid(experts, 2 * nodes, 2)
    loads_E = rng.uniform(0.5, 1.5, experts)
    order_E = order_with_pairs(loads_E, pairs_EE, grid, "affinity")
    for node in cluster_E[order_E].reshape(nodes, -1):
        assert len(set(node.tolist())) == 1
    # And inside of a node its ranks are even.
    for node in order_E.reshape(nodes, -1):
        assert busiest(loads_E, node, 2) <= loads_E[node].sum() / 2 * 1.05


def test_whole_groups_that_are_chosen_together_come_to_one_node(rng):
    pairs_GG, cluster_G = clustered(rng, 8, 4)
    pairs_EE = np.kron(pairs_GG, np.ones((4, 4)))
    order_E = order_with_pairs(np.ones(32), pairs_EE, Grid(32, 16, 4, 8), "affinity")
    assert [len(set(node)) for node in cluster_G[order_E // 4].reshape(4, -1)] == [1] * 4


def test_the_weight_inside_is_that_of_each_pair_once(rng):
    pairs_EE, order_E = symmetric(rng, 16), rng.permutation(16)
    node_E = np.argsort(order_E) // 4
    expected = sum(pairs_EE[a, b] for a, b in combinations(range(16), 2) if node_E[a] == node_E[b])
    assert weight_inside(pairs_EE, order_E, 4) == expected


def test_with_both_no_rank_is_much_busier_than_with_load_and_many_pairs_are_inside(rng):
    pairs_EE, cluster_E = clustered(rng, 128, 4)
    grid, loads_E = Grid(128, 16, 4), rng.lognormal(0, 0.5, 128) * (1 + cluster_E / 4)
    by_load = even_orders(loads_E[None], grid)[0]
    orders = {by: order_with_pairs(loads_E, pairs_EE, grid, by) for by in ("affinity", "both")}
    inside = {by: weight_inside(pairs_EE, order_E, 4) for by, order_E in orders.items()}
    limit = busiest(loads_E, by_load, 16) * (1 + SLACK)
    assert busiest(loads_E, orders["both"], 16) <= limit * (1 + 1e-12)
    # The clusters differ in load, so that the most pairs and even ranks exclude each other.
    assert busiest(loads_E, orders["affinity"], 16) > limit
    of_load = weight_inside(pairs_EE, by_load, 4)
    assert inside["both"] > of_load + 0.5 * (inside["affinity"] - of_load)


def test_with_both_whole_ranks_come_to_one_node_where_no_expert_can_leave_its_rank():
    # Ranks are even, and any two experts of different ranks differ by a twentieth of their load.
    loads_E = np.array([10.0, 30, 12, 28, 14, 26, 16, 24])
    pairs_EE = np.zeros((8, 8))
    for one, other in ((0, 7), (2, 5)):  # of the first and the last rank, and of the others
        pairs_EE[one, other] = pairs_EE[other, one] = 1
    order_E = order_with_pairs(loads_E, pairs_EE, Grid(8, 4, 2), "both")
    assert weight_inside(pairs_EE, order_E, 2) == 2
    assert rank_loads(loads_E[order_E], 4).tolist() == [40] * 4


def test_without_pairs_the_order_is_that_of_the_loads(rng):
    loads_E, grid = rng.lognormal(0, 0.5, 32), Grid(32, 8, 2)
    order_E = order_with_pairs(loads_E, np.zeros((32, 32)), grid, "both")
    assert (order_E == even_orders(loads_E[None], grid)[0]).all()
