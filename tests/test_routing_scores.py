"""Scores that a host does not know, of experts and of their groups, and gates that cannot learn.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from routing_cases import U
from torch import Tensor

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.routing.assignment import HostRules, limited_to_groups, scores_of, weights_of
from ezpz_moe.routing.gate import COLDEST, HOTTEST, gate_logits, why_untrained

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


def written_score(logits: list[float], score_func: str) -> list[float]:
    if score_func == "softmax":
        total = math.fsum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]
    if score_func == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    return [math.sqrt(max(x, 0) + math.log1p(math.exp(-abs(x)))) for x in logits]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("score_func", SCORES)
def test_a_score_is_the_one_written_out_in_at_least_float32(
    score_func: str, dtype: torch.dtype
) -> None:
    """(E + 8) roundings in float32; exponentials are off by the rounding of their argument too."""
    torch.manual_seed(0)
    logits_TE = (4 * torch.randn(50, 6)).to(dtype)
    scores_TE = scores_of(logits_TE, score_func)
    assert scores_TE.dtype == torch.float32
    for logits_E, found_E in zip(logits_TE.tolist(), scores_TE.tolist(), strict=True):
        off = (len(logits_E) + 8 + 2 * max(map(abs, logits_E))) * U
        # softplus is linear above 20, where it is off by exp(-20) = 2.1e-9.
        assert found_E == pytest.approx(written_score(logits_E, score_func), rel=off + 2.1e-9)


@pytest.mark.parametrize("score_func", SCORES)
def test_gradients_of_a_score_are_right_and_finite_at_the_ends(score_func: str) -> None:
    torch.manual_seed(0)
    logits_TE = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scores_of(x, score_func), logits_TE)
    far_E = torch.tensor([-200.0, -90.0, 0.0, 90.0], requires_grad=True)
    scores_of(far_E, score_func).square().sum().backward()
    assert far_E.grad.isfinite().all()


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="'tanh' is not one of softmax, sigmoid, sqrtsoftplus"):
        scores_of(torch.zeros(1, 2), "tanh")


# Groups -------------------------------------------------------------------------------------------

GROUP_SCORES = ("top2_sum", "max", "topk_sum")


def written_limit(scores: list[float], groups: int, limited: int, kind: str, K: int) -> set[int]:
    """The experts of the best groups."""
    size = len(scores) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    best = {"top2_sum": 2, "max": 1, "topk_sum": max(1, K // limited)}[kind]
    of_group = [sum(sorted((scores[e] for e in each), reverse=True)[:best]) for each in members]
    ranked = sorted(range(groups), key=lambda g: of_group[g], reverse=True)
    return {e for g in ranked[:limited] for e in members[g]}


@pytest.mark.parametrize("kind", GROUP_SCORES)
@pytest.mark.parametrize(
    ("E", "groups", "limited", "K"),
    [(16, 4, 2, 6), (16, 4, 1, 4), (16, 4, 3, 2), (12, 3, 3, 6), (8, 8, 3, 3)],
)
def test_groups_are_limited_as_written_out(
    E: int, groups: int, limited: int, K: int, kind: str
) -> None:
    """Also groups of one expert. Scores are multiples of 1/64, whose sums are exact."""
    draw = torch.Generator().manual_seed(0)
    # Distinct in a token, so that neither an expert nor a group ties but by a sum.
    scores_TE = torch.stack([torch.randperm(997, generator=draw)[:E] for _ in range(60)]) / 64
    rules = {"groups": groups, "limited": limited, "group_score": kind, "top_k": K}
    found_TE = limited_to_groups(scores_TE, **rules)
    kept_TE = found_TE != -torch.inf
    assert torch.equal(found_TE[kept_TE], scores_TE[kept_TE])
    for scores_E, kept_E in zip(scores_TE.tolist(), kept_TE.tolist(), strict=True):
        expected = written_limit(scores_E, groups, limited, kind, K)
        assert {e for e in range(E) if kept_E[e]} == expected


def test_the_three_ways_choose_different_groups() -> None:
    """Or the test above could not tell them apart."""
    scores_E = torch.tensor([9.0, 0, 0, 0, 6, 5, 0, 0, 4, 4, 4, 4])
    kept = {
        kind: limited_to_groups(scores_E, groups=3, limited=1, group_score=kind, top_k=4).argmax()
        for kind in GROUP_SCORES
    }
    assert kept == {"max": 0, "top2_sum": 4, "topk_sum": 8}


# Gates that cannot learn --------------------------------------------------------------------------


def gradient(settings: Router, score_func: str, E: int, K: int, norm: bool) -> Tensor:
    """Of the gate's logits, for a loss that is linear in the weights of the chosen experts."""
    torch.manual_seed(0)
    logits_BLE = torch.randn(1, 200, E, requires_grad=True)
    now = {"temperature": settings.temperature.end} if settings.schedules else {}
    _, logits_of_gate_BLE = gate_logits(logits_BLE, settings, now, is_counted=True)
    scores_BLE = scores_of(logits_of_gate_BLE, score_func)
    ids_BLK = scores_BLE.topk(K).indices
    weights_BLK = weights_of(scores_BLE, ids_BLK, HostRules(norm, 1.0, None))
    (weights_BLK * torch.randn_like(weights_BLK)).sum().backward()
    return logits_BLE.grad


def case(score_func: str, E: int, K: int, norm: bool, activation: str, temperature: float):
    return score_func, E, K, norm, Router(activation=activation, temperature=temperature)


CASES = [
    case(score_func, E, K, norm, activation, temperature)
    for score_func, (E, K), norm, activation, temperature in product(
        SCORES,
        ((1, 1), (8, 1), (8, 2), (8, 8)),
        (False, True),
        ("identity", "softplus", "relu_rmsnorm"),
        (1.0, COLDEST / 100, HOTTEST * 100),
    )
]


@pytest.mark.parametrize("score_func", SCORES)
def test_a_gate_is_named_that_has_next_to_no_gradient_and_no_other(score_func: str) -> None:
    """Every combination of what decides it, by the gradient itself.

    A few roundings of float32 is what a weight of 1 over itself leaves. Of the temperatures beyond
    the ends a cold one may still teach a gate that has an unbounded score, or whose activation
    undoes the temperature: they are named for what they do to the others.
    """
    for of_score, E, K, norm, settings in CASES:
        if of_score != score_func:
            continue
        named = list(why_untrained(settings, score_func=of_score, experts=E, top_k=K, norm=norm))
        largest = gradient(settings, of_score, E, K, norm).abs().max().item()
        if settings.temperature.end == 1:
            assert bool(named) == (largest <= 8 * U), (E, K, norm, settings)
        else:
            assert named
    learning = {"score_func": score_func, "experts": 8, "top_k": 2, "norm": True}
    for end in (COLDEST, HOTTEST):
        assert not list(why_untrained(Router(temperature=end), **learning))


def test_a_gate_that_is_meant_to_learn_nothing_is_not_named() -> None:
    one = {"score_func": "softmax", "experts": 8, "top_k": 1, "norm": True}
    assert not list(why_untrained(Router(freeze=True), **one))
    # What each of them tells a reader to set is what ends the remark.
    in_turn = Router(routing="balanced")
    assert 'taken in turn. Set it to "topk"' in next(why_untrained(in_turn, **one))
    single = next(why_untrained(Router(), **one | {"experts": 1}))
    for said in (next(why_untrained(in_turn, **one)), single):
        assert "freeze = true" in said
    frozen = Router(routing="balanced", freeze=True)
    assert not list(why_untrained(frozen, **one))
    assert "keep_top1_score = true" in next(why_untrained(Router(), **one))
