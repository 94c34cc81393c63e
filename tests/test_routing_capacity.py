"""Which choices an expert has no place for: against loops over tokens, and in a model.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
import torch
from routing_cases import over_runs
from torch import Tensor

from ezpz_moe.routing.capacity import beyond_capacity, capacity
from ezpz_moe.routing.counters import count_dropped


def written_out(
    ids_TK: list[list[int]], weights_TK: list[list[float]], experts: int, places: int, drop: str
) -> list[list[bool]]:
    """Token by token in the order of precedence, and each takes a place if there is one."""
    choices = [(t, k) for t, row in enumerate(ids_TK) for k in range(len(row))]
    if drop == "probability":
        choices.sort(key=lambda at: -weights_TK[at[0]][at[1]])  # stable
    taken = [0] * experts
    beyond = [[False] * len(row) for row in ids_TK]
    for t, k in choices:
        expert = ids_TK[t][k]
        if expert < experts:
            beyond[t][k] = taken[expert] >= places
            taken[expert] += 1
    return beyond


@pytest.mark.parametrize("drop", ["last", "probability"])
@pytest.mark.parametrize("places", [1, 3, 100])
@pytest.mark.parametrize("skew", [1.0, 4.0])
def test_choices_beyond_a_capacity(drop: str, places: int, skew: float) -> None:
    """Some choices are of no expert: 4 and 5 have no capacity. Some weights are equal."""
    T, K, E = 13, 2, 4
    generator = torch.Generator().manual_seed(int(skew))
    scores_TE = torch.rand(T, E + 2, generator=generator) ** skew
    ids_TK = scores_TE.topk(K).indices
    weights_TK = (8 * torch.rand(T, K, generator=generator)).round() / 8
    found = beyond_capacity(
        ids_TK, weights_TK, experts=E, capacity=places, by_weight=drop == "probability"
    )
    expected = written_out(ids_TK.tolist(), weights_TK.tolist(), E, places, drop)
    assert found.tolist() == expected
    assert found.any() == (places < 100)
    kept = ids_TK[~found]
    assert kept.bincount(minlength=E)[:E].max() <= places


def test_no_tokens() -> None:
    none_TK = torch.empty(0, 2, dtype=torch.int64)
    found = beyond_capacity(none_TK, none_TK.float(), experts=3, capacity=1, by_weight=True)
    assert found.shape == (0, 2)


def test_a_capacity_is_an_even_share_times_the_factor() -> None:
    assert capacity(96, 8, factor=1.25, least=1) == 15
    assert capacity(97, 8, factor=1.0, least=1) == ceil(97 / 8)
    assert capacity(8, 8, factor=0.1, least=4) == 4
    assert capacity(96, 8, factor=1e300, least=1) == 96


def test_two_ranks_drop_what_one_drops_of_the_same_tokens() -> None:
    """A capacity is of a rank's own choices among all experts, wherever these are.

    Two experts, each on a rank of its own: by what a rank receives, nothing would ever be dropped.
    """
    ids_TK = torch.zeros(10, 1, dtype=torch.int64)  # all want expert 0
    places = capacity(10, 2, factor=1.2, least=1)
    found = beyond_capacity(ids_TK, torch.ones(10, 1), experts=2, capacity=places, by_weight=False)
    assert found.flatten().tolist() == [False] * 6 + [True] * 4


@over_runs
def test_what_is_dropped_is_counted_once_recomputed_or_not(run: Callable) -> None:
    torch._dynamo.reset()
    choices_2 = torch.zeros(2, dtype=torch.int64)
    ids_TK = torch.tensor([[0, 1], [0, 2], [0, 3]])

    def layer(x_TD: Tensor) -> Tensor:
        is_beyond_TK = beyond_capacity(ids_TK, x_TD, experts=3, capacity=2, by_weight=False)
        count_dropped(choices_2, is_beyond_TK, ids_TK, 3)
        return x_TD.square()

    x_TD = torch.ones(3, 2, requires_grad=True)
    run(layer)(x_TD).sum().backward()
    assert choices_2.tolist() == [5, 1]  # expert 3 is none of the three
