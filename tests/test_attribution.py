"""Each expert's shares of a text, written out token by token."""

import pytest
import torch

from ezpz_moe.tools.analysis.attribution import attribution
from ezpz_moe.tools.analysis.record import Recording, Routing

E = 4
# The id E is that of no expert: tokens with two experts, with one, and with none.
IDS = [[0, 1], [1, 3], [1, 4], [4, 4], [3, 1]]
WEIGHTS = [[0.75, 0.25], [0.5, 0.125], [1.0, 9.0], [9.0, 9.0], [0.25, 0.5]]


def _recording(ids: list, weights: list) -> Recording:
    routing = Routing(torch.tensor([ids]), E, torch.tensor([weights]))
    return Recording(0.0, {"layers.7": routing}, {})


def _expected(ids: list, weights: list) -> list[tuple[float, float]]:
    tokens, weight = [0.0] * E, [0.0] * E
    for of_token, weights_of_token in zip(ids, weights, strict=True):
        used = [expert for expert in of_token if expert < E]
        for expert, its_weight in zip(of_token, weights_of_token, strict=True):
            if expert < E:
                tokens[expert] += 1 / len(used)
                weight[expert] += its_weight
    return [
        (of_tokens / sum(tokens), of_weight / sum(weight))
        for of_tokens, of_weight in zip(tokens, weight, strict=True)
    ]


def test_shares_are_their_formula():
    found = attribution(_recording(IDS, WEIGHTS))
    assert [(each.layer, each.expert) for each in found] == [(7, expert) for expert in range(E)]
    shares = [(each.share_of_tokens, each.share_of_weight) for each in found]
    assert [each.against for each in found] == [None] * E
    for share, expected in zip(shares, _expected(IDS, WEIGHTS), strict=True):
        assert share == pytest.approx(expected, rel=1e-12)


def test_another_text_is_beside_it():
    other = [[0, 2]] * 5
    found = attribution(_recording(IDS, WEIGHTS), _recording(other, WEIGHTS))
    for each, (tokens, weight) in zip(found, _expected(other, WEIGHTS), strict=True):
        assert each.against["share_of_tokens"] == pytest.approx(tokens)
        assert each.against["share_of_weight"] == pytest.approx(weight)


def test_a_layer_that_nobody_chose_has_no_shares():
    found = attribution(_recording([[4, 4]], [[1.0, 1.0]]))
    assert [each.share_of_tokens for each in found] == [0.0] * E
