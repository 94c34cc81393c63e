"""Runs of neighbouring experts: they cover all rows, keep the bound, and are few."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ezpz_moe.compute.runs import Run, runs_within

counts_of_experts = st.lists(st.integers(0, 40), min_size=1, max_size=24).map(tuple)
bounds = st.sampled_from([0.0, 0.1, 0.25, 1.0, 5.0])


@given(counts_of_experts, bounds)
@example((0, 0), 0.25)
@example((3, 0, 3), 0.5)
@example((3, 0, 3), 0.49)
def test_runs_hold_every_row_once_and_keep_the_bound(
    counts: tuple[int, ...], max_padding: float
) -> None:
    runs = runs_within(counts, max_padding)
    held = [expert for run in runs for expert in range(run.first, run.stop)]
    assert held == sorted(set(held))
    assert {expert for expert, count in enumerate(counts) if count} <= set(held)
    for run in runs:
        rows = counts[run.first : run.stop]
        assert rows[0] > 0, "an expert without rows at the beginning of a run"
        assert rows[-1] > 0, "an expert without rows at the end of a run"
        assert run.capacity == max(rows)
        assert (run.start, run.end) == (sum(counts[: run.first]), sum(counts[: run.stop]))
        assert run.padding == sum(run.capacity - count for count in rows)
    assert sum(run.padding for run in runs) <= max_padding * sum(counts)


def written_out(counts: tuple[int, ...], max_padding: float) -> list[tuple[int, int]]:
    """(first, stop) of the runs: again and again the best pair of all."""
    runs = [(e, e + 1) for e, count in enumerate(counts) if count]

    def padding(first: int, stop: int) -> int:
        return (stop - first) * max(counts[first:stop]) - sum(counts[first:stop])

    while len(runs) > 1:
        merged = [
            (padding(one[0], other[1]) - padding(*one) - padding(*other), index)
            for index, (one, other) in enumerate(pairwise(runs))
        ]
        added, index = min(merged)
        if sum(padding(*run) for run in runs) + added > max_padding * sum(counts):
            break
        runs[index : index + 2] = [(runs[index][0], runs[index + 1][1])]
    return runs


@given(counts_of_experts, bounds)
def test_the_pair_that_adds_least_padding_is_merged_first(
    counts: tuple[int, ...], max_padding: float
) -> None:
    runs = runs_within(counts, max_padding)
    assert [(run.first, run.stop) for run in runs] == written_out(counts, max_padding)


def test_an_even_routing_is_one_run_without_padding() -> None:
    assert runs_within((64,) * 128, 0.0) == (Run(0, 128, 64, 0, 128 * 64),)


@pytest.mark.parametrize(("order", "launches"), [("by load", 10), ("shuffled", 45)])
def test_skew_costs_few_launches(order: str, launches: int) -> None:
    """Zipf-1 over 128 experts, where one run would compute 24 rows for each with a token."""
    share = sum(1 / rank for rank in range(1, 129))
    counts = [int(8192 / rank / share) for rank in range(1, 129)]
    (single,) = runs_within(tuple(counts), 1e9)
    assert single.padding > 22 * sum(counts)
    if order == "shuffled":
        random.Random(0).shuffle(counts)
    assert len(runs_within(tuple(counts), 0.25)) <= launches


def test_without_a_bound_all_experts_with_rows_are_one_run() -> None:
    assert runs_within((0, 3, 0, 5, 0), 1e9) == (Run(1, 4, 5, 0, 8),)
    assert runs_within((0, 0), 1e9) == runs_within((), 1e9) == ()
