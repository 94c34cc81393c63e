"""Runs of neighbouring experts that one batched product computes, with bounded padding.

A batched product takes one weight tensor with one stride: without copying weights, these are
experts next to each other. Each of them gets as many rows as the busiest in the run, so merging
runs trades launches for padding. Plain Python on the host; no tensors here.
"""

from __future__ import annotations

import heapq
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple


class Run(NamedTuple):
    """The experts ``first : stop``, each computed with ``capacity`` rows.

    Their own rows are ``start : end``.
    """

    first: int
    stop: int
    capacity: int
    start: int
    end: int

    @property
    def experts(self) -> int:
        return self.stop - self.first

    @property
    def padding(self) -> int:
        """Computed rows that carry no token."""
        return self.experts * self.capacity - (self.end - self.start)


@lru_cache(maxsize=256)  # backward asks the same as forward
def runs_within(counts: tuple[int, ...], max_padding: float) -> tuple[Run, ...]:
    """Return few runs that cover every expert with rows, in the experts' order.

    Merges neighbours, first the pair that adds the least padding, until the next merge would bring
    the padding of all runs above ``max_padding`` times the rows. Experts without rows are in a run
    only if they lie between two with rows.
    """
    # Start with one run per expert, or per stretch of equally busy neighbours.
    first: list[int] = []
    stop: list[int] = []
    capacity: list[int] = []
    for expert, count in enumerate(counts):
        if count and stop and stop[-1] == expert and capacity[-1] == count:
            stop[-1] += 1  # as busy as its neighbour: one run at no cost
        elif count:
            first.append(expert)
            stop.append(expert + 1)
            capacity.append(count)
    # Merging i with the next run, j, grows i; j then no longer exists, and its stop is 0.
    before, after = [*range(-1, len(first) - 1)], [*range(1, len(first)), -1]

    def offer(i: int, j: int) -> tuple[int, int, int, int]:
        """Return (padding that merging adds, i, and two values that show if i or j has grown)."""
        experts = stop[j] - first[i]
        computed = (stop[i] - first[i]) * capacity[i] + (stop[j] - first[j]) * capacity[j]
        return experts * max(capacity[i], capacity[j]) - computed, i, stop[i], stop[j]

    # Greedy with a heap: a merge makes at most two new offers, so a plan takes O(E log E). Python
    # makes it for every new routing, between launches.
    offers = [offer(i, i + 1) for i in range(len(first) - 1)]
    heapq.heapify(offers)
    # Spend the allowed padding on the cheapest merges first.
    # The budget is for all runs together: a limit per run would forbid cheap merges next to a hot
    # expert.
    left = max_padding * sum(counts)
    while offers and offers[0][0] <= left:
        added, i, stop_i, stop_j = heapq.heappop(offers)
        j = after[i]
        # This offer is out of date: i or j was merged after it was made.
        if stop[i] != stop_i or stop[j] != stop_j:
            continue
        left -= added
        capacity[i], stop[i], stop[j] = max(capacity[i], capacity[j]), stop_j, 0
        after[i] = after[j]
        if before[i] >= 0:
            heapq.heappush(offers, offer(before[i], i))
        if after[i] >= 0:
            before[after[i]] = i
            heapq.heappush(offers, offer(i, after[i]))
    starts = [0, *accumulate(counts)]
    return tuple(
        Run(first[i], stop[i], capacity[i], starts[first[i]], starts[stop[i]])
        for i in range(len(first))
        if stop[i]
    )
