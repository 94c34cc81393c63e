"""Orders that even the load of ranks: equally many experts on each, the busiest as low as possible.

To divide numbers into R sets of C each with the least largest sum is balanced number partitioning,
which is NP-hard from three to a set on. Here the busiest rank exchanges experts with another one,
k for k, as long as that makes it less busy. Up to C = 6 every k is tried, which divides the two
ranks' experts in the best of all ways. Then those of three ranks are dealt anew at random, and it
goes on from there. Few experts on few ranks are divided in all ways.

Legend: :mod:`ezpz_moe.tools.placement`; M = sets of k of the C items, P = ways to divide.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import numpy as np
import numpy.typing as npt

from ezpz_moe.tools.placement.orders import Floats, Ints, settled

PRECISION = 1e-3
"""Nearer to the least possible nothing is sought: loads differ more from step to step."""

_SUBSETS = 28  # of one k: every k up to C = 6, and pairs up to C = 8
_CANDIDATES = 2_000_000  # exchanges compared at a time, of several layers: 16 MB
_WAYS = 3000  # to divide items, up to which all are tried
_KICKS = 24  # attempts to leave a local optimum


def even_order(loads_XI: Floats, ranks: int) -> Ints:
    """Return orders [X, I] with which the busiest of the ranks has as little as can be found.

    Starts from the order that is there, so that items move only where that helps; equal loads stay.
    Each of X is ordered by itself, and the same loads get the same order every time.

    Args:
        loads_XI: what each item has, not negative; X independent problems.
        ranks: R, a divisor of I.
    """
    problems, items = loads_XI.shape
    start_XRC = np.broadcast_to(np.arange(items), loads_XI.shape).reshape(problems, ranks, -1)
    if ranks in (1, items):  # every order has the same busiest rank
        return start_XRC.reshape(problems, items).copy()
    sets_XRC = _exchanged(loads_XI, start_XRC)
    enough_X = least_possible(loads_XI, ranks) * (1 + PRECISION)
    (open_x,) = np.nonzero(_busiest(loads_XI, sets_XRC) > enough_X)
    if _ways(items, ranks) <= _WAYS:
        for x in open_x:
            sets_XRC[x] = _best_of_all(loads_XI[x], ranks)
    else:
        sets_XRC[open_x] = _kicked(loads_XI[open_x], sets_XRC[open_x], enough_X[open_x])
    return np.stack([settled(sets_RC) for sets_RC in sets_XRC])


def least_possible(loads_XI: Floats, ranks: int) -> Floats:
    """Return what the busiest rank has at least, in any order: [X].

    It is no less than the mean. And of the m R + 1 highest loads some rank has m + 1, which are no
    less than the last m + 1 of them, and beside them no less than the lowest loads.
    """
    items = loads_XI.shape[1]
    highest_XI = -np.sort(-loads_XI, axis=1)
    least_X: Floats = loads_XI.sum(1) / ranks
    for m in range(items // ranks):
        several_X = highest_XI[:, m * ranks - m : m * ranks + 1].sum(1)
        lowest_X = highest_XI[:, items - (items // ranks - m - 1) :].sum(1)
        least_X = np.maximum(least_X, several_X + lowest_X)
    return least_X


def _busiest(loads_XI: Floats, sets_XRC: Ints) -> Floats:
    busiest_X: Floats = _of_sets(loads_XI, sets_XRC).sum(-1).max(1)
    return busiest_X


def _of_sets(loads_XI: Floats, sets_XRC: Ints) -> Floats:
    return np.take_along_axis(loads_XI, sets_XRC.reshape(loads_XI.shape), 1).reshape(sets_XRC.shape)


# Exchanges ----------------------------------------------------------------------------------------


def _exchanged(loads_XI: Floats, start_XRC: Ints) -> Ints:
    """Exchange until no rank above the mean can be relieved by another one.

    A rank that cannot is left alone, and the busiest of the others is next: which one is the
    busiest changes from step to step, so all of them count.
    """
    sets_XRC = start_XRC.copy()
    problems, ranks, per_rank = sets_XRC.shape
    enough_X = loads_XI.sum(1) / ranks * (1 + PRECISION)
    is_stuck_XR = np.zeros((problems, ranks), dtype=bool)
    x = np.arange(problems)
    while True:
        sums_xR = _of_sets(loads_XI[x], sets_XRC[x]).sum(-1)
        free_xR = np.where(is_stuck_XR[x], -np.inf, sums_xR)
        is_open_x = free_xR.max(1) > enough_X[x]
        x, busiest_x = x[is_open_x], free_xR.argmax(1)[is_open_x]
        if not len(x):
            return sets_XRC
        left = np.arange(len(x))
        for subsets_Mk in _subsets(per_rank):
            step = max(1, _CANDIDATES // (ranks * len(subsets_Mk) ** 2))
            is_better = np.zeros(len(left), dtype=bool)
            for first in range(0, len(left), step):
                some = left[first : first + step]
                sets_XRC[x[some]], is_better[first : first + step] = _exchange(
                    loads_XI[x[some]], sets_XRC[x[some]], busiest_x[some], subsets_Mk
                )
            left = left[~is_better]
        is_stuck_XR[x[left], busiest_x[left]] = True


def _exchange(
    loads_XI: Floats, sets_XRC: Ints, busiest_X: Ints, subsets_Mk: Ints
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Exchange k of the busiest rank's items for k of another's, where both are then less busy.

    Of all exchanges takes the one with which the busier of the two is least busy. Returns the sets,
    and in which problems there was one.
    """
    loads_XRC = _of_sets(loads_XI, sets_XRC)
    sums_XR = loads_XRC.sum(-1)
    parts_XRM = loads_XRC[:, :, subsets_Mk].sum(-1)
    x = np.arange(len(sets_XRC))
    own_X, own_XM = sums_XR[x, busiest_X], parts_XRM[x, busiest_X]
    half_XR = (own_X[:, None] - sums_XR) / 2  # what would make the two equal
    given_XRMM = own_XM[:, None, :, None] - parts_XRM[:, :, None, :]
    after_XRMM = (own_X[:, None] - half_XR)[:, :, None, None] + np.abs(
        given_XRMM - half_XR[:, :, None, None]
    )
    after_XRMM[x, busiest_X] = np.inf
    best_X = after_XRMM.reshape(len(x), -1).argmin(1)
    other_X, given_X, taken_X = np.unravel_index(best_X, after_XRMM.shape[1:])
    # Not by rounding alone, or two ranks would exchange for ever.
    is_better_X = after_XRMM[x, other_X, given_X, taken_X] < own_X * (1 - 1e-12)
    sets_XRC, x = sets_XRC.copy(), x[is_better_X]
    one = x[:, None], busiest_X[x, None], subsets_Mk[given_X[x]]
    two = x[:, None], other_X[x, None], subsets_Mk[taken_X[x]]
    sets_XRC[one], sets_XRC[two] = sets_XRC[two], sets_XRC[one]
    return sets_XRC, is_better_X


@cache
def _subsets(per_rank: int) -> list[Ints]:
    """Return for each k that is tried all sets of k of a rank's places: [M, k].

    To exchange more than half is to exchange the rest, and to name the ranks the other way round.
    """
    return [
        np.array(list(combinations(range(per_rank), k)))
        for k in range(1, per_rank // 2 + 1)
        if k == 1 or math.comb(per_rank, k) <= _SUBSETS
    ]


def _kicked(loads_XI: Floats, sets_XRC: Ints, enough_X: Floats) -> Ints:
    """Leave local optima: deal three ranks' items anew, at random, exchange, and keep the best."""
    best_XRC, busiest_X = sets_XRC.copy(), _busiest(loads_XI, sets_XRC)
    # Each problem has its own numbers: what is beside it changes nothing.
    random_X = [np.random.default_rng(0) for _ in loads_XI]
    for _ in range(_KICKS):
        (x,) = np.nonzero(busiest_X > enough_X)
        if not len(x):
            break
        tried_xRC = best_XRC[x]
        for sets_RC, loads_I, each in zip(tried_xRC, loads_XI[x], x, strict=True):
            _deal(sets_RC, int(loads_I[sets_RC].sum(1).argmax()), random_X[each])
        tried_xRC = _exchanged(loads_XI[x], tried_xRC)
        of_tried_x = _busiest(loads_XI[x], tried_xRC)
        is_better_x = of_tried_x < busiest_X[x]
        best_XRC[x[is_better_x]] = tried_xRC[is_better_x]
        busiest_X[x] = np.minimum(busiest_X[x], of_tried_x)
    return best_XRC


def _deal(sets_RC: Ints, busiest: int, random: np.random.Generator) -> None:
    """Deal the items of the busiest rank and of two others anew, in place."""
    others = np.delete(np.arange(len(sets_RC)), busiest)
    ranks = np.append(random.choice(others, size=min(2, len(others)), replace=False), busiest)
    sets_RC[ranks] = random.permutation(sets_RC[ranks].reshape(-1)).reshape(len(ranks), -1)


# All ways -----------------------------------------------------------------------------------------


def _best_of_all(loads_I: Floats, ranks: int) -> Ints:
    """Return the best of all ways to divide few items: of equally good ones, where fewest move."""
    rank_PI = _all_ways(len(loads_I), ranks)
    busiest_P = np.max([(rank_PI == rank) @ loads_I for rank in range(ranks)], axis=0)
    at_home_I = np.arange(len(loads_I)) // (len(loads_I) // ranks)
    moved_P = (rank_PI != at_home_I).sum(1)
    is_good_P = busiest_P <= busiest_P.min() * (1 + PRECISION)
    best = np.where(is_good_P, moved_P, len(loads_I) + 1).argmin()
    order_I: Ints = np.argsort(rank_PI[best], kind="stable")
    return order_I.reshape(ranks, -1)


def _ways(items: int, ranks: int) -> int:
    """Return in how many ways the items can be divided among the ranks."""
    return math.factorial(items) // math.factorial(items // ranks) ** ranks


@cache
def _all_ways(items: int, ranks: int) -> npt.NDArray[np.int8]:
    """Return every way to divide them: the rank of each item, [P, I]."""
    ways = np.full((1, items), -1, dtype=np.int8)
    for rank in range(ranks):
        free_PF = np.argwhere(ways < 0)[:, 1].reshape(len(ways), -1)
        chosen_MC = np.array(list(combinations(range(free_PF.shape[1]), items // ranks)))
        ways = np.repeat(ways, len(chosen_MC), axis=0)
        of_rank = np.concatenate([free_F[chosen_MC] for free_F in free_PF])
        np.put_along_axis(ways, of_rank, np.int8(rank), axis=1)
    return ways
