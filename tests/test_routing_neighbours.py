"""Routing by ReLU and the losses of neighbouring tokens, against their formulas written out.

The references are plain Python in float64. Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.routing import losses
from ezpz_moe.routing.activated import every_active
from ezpz_moe.routing.assignment import HostRules
from ezpz_moe.routing.gate import activated, gate_logits
from ezpz_moe.routing.neighbours import Neighbours, chunk_loss, locality_loss

B, L, E = 2, 7, 4
EXACT = 1e-12  # a hundred float64 sums and products of numbers below 100

MASKS = {
    "none padded": [[True] * L] * B,
    "some padded": [[True, True, False, True, True, True, False], [True] * 5 + [False] * 2],
    "a sequence padded": [[True] * L, [False] * L],
    "all padded": [[False] * L] * B,
}
over_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
over_scopes = pytest.mark.parametrize("by_sequence", [True, False], ids=["sequence", "batch"])


def case(mask: list[list[bool]], *, by_sequence: bool) -> tuple[Tensor, Tensor]:
    """raw_GNE and mask_GN; padding has NaN. Small logits: 100 times as much is not yet 0 or 1."""
    draw = torch.Generator().manual_seed(0)
    raw_BLE = 0.02 * torch.randn(B, L, E, generator=draw, dtype=torch.float64)
    mask_BL = torch.tensor(mask)
    raw_BLE = raw_BLE.masked_fill(~mask_BL.unsqueeze(-1), torch.nan)
    groups = [losses.in_groups(each, by_sequence=by_sequence) for each in (raw_BLE, mask_BL)]
    return groups[0].requires_grad_(), groups[1]


def sequences_of(values_GN: Tensor) -> list[list]:
    """Every group's sequences."""
    return [group.unflatten(0, (-1, L)).tolist() for group in values_GN]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def written_locality(raw: list, mask: list) -> float:
    found = []
    for tokens, counts in zip(raw, mask, strict=True):
        for t in range(L - 1):
            if counts[t] and counts[t + 1]:
                for before, after in zip(tokens[t], tokens[t + 1], strict=True):
                    a, target = sigmoid(100 * before), sigmoid(100 * after)
                    found.append(-target * math.log(a) - (1 - target) * math.log(1 - a))
    return sum(found) / max(len(found), 1)


@over_masks
@over_scopes
def test_the_locality_loss_is_the_one_written_out(mask, by_sequence: bool) -> None:
    raw_GNE, mask_GN = case(mask, by_sequence=by_sequence)
    found_G = locality_loss(Neighbours(raw_GNE, L, 2), mask_GN, losses.alone)
    pairs = zip(sequences_of(raw_GNE), sequences_of(mask_GN), strict=True)
    expected_G = [written_locality(*of_group) for of_group in pairs]
    assert found_G.tolist() == pytest.approx(expected_G, rel=EXACT)


def written_chunk(p: list, mask: list, chunk: int) -> float:
    found = []
    for tokens, counts in zip(p, mask, strict=True):
        for start in range(0, L, chunk):
            those = [
                each for each, count in zip(tokens[start:], counts[start:], strict=True) if count
            ]
            first = [t for t in range(start, min(start + chunk, L)) if counts[t]]
            those = those[: len(first)]
            if first:
                unused = [math.prod(1 - each[e] for each in those) for e in range(E)]
                found.append(1 - sum(unused) / E)
    return sum(found) / max(len(found), 1)


@over_masks
@over_scopes
@pytest.mark.parametrize("chunk", [2, 7, 64])  # the first leaves one token over
def test_the_chunk_loss_is_the_one_written_out(mask, by_sequence: bool, chunk: int) -> None:
    raw_GNE, mask_GN = case(mask, by_sequence=by_sequence)
    p_GNE = losses.probabilities(raw_GNE.relu(), mask_GN)
    found_G = chunk_loss(Neighbours(raw_GNE, L, chunk), p_GNE, mask_GN, losses.alone)
    pairs = zip(sequences_of(p_GNE), sequences_of(mask_GN), strict=True)
    expected_G = [written_chunk(*of_group, chunk) for of_group in pairs]
    assert found_G.tolist() == pytest.approx(expected_G, rel=EXACT)


def both_losses(raw_GNE: Tensor, mask_GN: Tensor) -> Tensor:
    of = Neighbours(raw_GNE, L, 3)
    p_GNE = losses.probabilities(raw_GNE.relu(), mask_GN)
    local_G = locality_loss(of, mask_GN, losses.alone)
    return local_G + chunk_loss(of, p_GNE, mask_GN, losses.alone)


@over_masks
def test_gradients_are_differences_and_padding_has_none(mask) -> None:
    """Also through the target of the cross-entropy, and where one expert has the whole token."""
    raw_GNE, mask_GN = case(mask, by_sequence=False)
    with torch.no_grad():
        raw_GNE[0, 0] = torch.tensor([0.03, -0.01, -0.02, -0.04]) if mask[0][0] else torch.nan
    (gradient_GNE,) = torch.autograd.grad(both_losses(raw_GNE, mask_GN).sum(), raw_GNE)
    assert (gradient_GNE[~mask_GN] == 0).all()
    filled_GNE = raw_GNE.detach().nan_to_num(0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda raw: both_losses(raw, mask_GN), filled_GNE, atol=1e-6)


@over_masks
def test_groups_on_two_ranks_have_the_loss_and_gradient_of_one(mask) -> None:
    """Whose sequences differ in how many pairs and chunks they have."""
    raw_GNE, mask_GN = case(mask, by_sequence=False)
    whole = both_losses(raw_GNE, mask_GN).sum()
    (gradient_GNE,) = torch.autograd.grad(whole, raw_GNE)
    halves = [(raw_GNE[:, :L], mask_GN[:, :L]), (raw_GNE[:, L:], mask_GN[:, L:])]
    added: list[list[Tensor]] = [[], []]

    def loss_of(rank: int, share) -> Tensor:
        raw, mask_GN = halves[rank]
        of = Neighbours(raw, L, 3)
        p_GNE = losses.probabilities(raw.relu(), mask_GN)
        return (locality_loss(of, mask_GN, share) + chunk_loss(of, p_GNE, mask_GN, share)).sum()

    for rank in (0, 1):
        loss_of(rank, lambda addend, rank=rank: added[rank].append(addend.detach()) or addend)
    parts = []
    for rank in (0, 1):
        others = iter(added[1 - rank])
        parts.append(loss_of(rank, lambda addend, others=others: addend + next(others)))
    assert [part.item() for part in parts] == pytest.approx([whole.item()] * 2, rel=EXACT)
    gradients = torch.autograd.grad(sum(parts), raw_GNE)[0]
    assert torch.allclose(gradients, gradient_GNE, rtol=EXACT, atol=EXACT)


def test_only_losses_that_are_asked_for_are_computed() -> None:
    raw_GNE, mask_GN = case(MASKS["none padded"], by_sequence=True)
    p_GNE = raw_GNE.softmax(-1)
    ids_GNK = p_GNE.topk(2).indices

    def found(*computed: str) -> dict[str, float]:
        of_each_L = losses.of_microbatch(
            raw_GNE,
            p_GNE,
            ids_GNK,
            mask_GN,
            losses.alone,
            routed_experts=3,
            neighbours=Neighbours(raw_GNE, L, 3),
            computed=computed,
        )
        return dict(zip(losses.LOSSES, of_each_L.tolist(), strict=True))

    alone = found("aux_loss", "chunk_loss")
    assert {name for name, value in alone.items() if value} == {"aux_loss", "chunk_loss"}
    assert found(*losses.LOSSES)["chunk_loss"] == alone["chunk_loss"]
    # Over the experts that compute.
    of = Neighbours(raw_GNE, L, 3)
    expected = chunk_loss(of, p_GNE[..., :3], mask_GN, losses.alone).sum()
    assert alone["chunk_loss"] == pytest.approx(expected.item(), rel=EXACT)


# Routing by ReLU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_a_token_has_every_expert_with_a_score(norm: bool) -> None:
    """Weights, ids and gradients; a negative score counts, and a token may have none."""
    scores_BLE = torch.tensor(
        [[[0, 2.0, 0, 0.5], [1, -3, 2, 4], [0, 0, 0, 0], [torch.nan] * 4]],
        dtype=torch.float64,
        requires_grad=True,
    )
    weights_BLK, ids_BLK, scores_BLE1 = every_active(scores_BLE, HostRules(norm, 2.5, None))
    assert ids_BLK.tolist() == [[[1, 3, 4, 4], [0, 1, 2, 3], [4] * 4, [0, 1, 2, 3]]]
    sums = [2.5, 4.0, 1.0] if norm else [1.0] * 3
    expected = [[2, 0.5, 0, 0], [1, -3, 2, 4], [0, 0, 0, 0]]
    for found, row, total in zip(weights_BLK[0].tolist()[:3], expected, sums, strict=True):
        assert found == pytest.approx([2.5 * x / total for x in row], rel=EXACT)
    assert weights_BLK[0, 3].isnan().all()
    assert torch.equal(scores_BLE1[..., :E].nan_to_num(7), scores_BLE.nan_to_num(7))
    assert (scores_BLE1[..., E] == 0).all()
    if not norm:
        (gradient_BLE,) = torch.autograd.grad(weights_BLK.sum(), scores_BLE)
        assert gradient_BLE.tolist()[0][:3] == [[0, 2.5, 0, 2.5], [2.5] * 4, [0] * 4]


def test_the_learned_scale_multiplies_the_norm() -> None:
    draw = torch.Generator().manual_seed(0)
    logits_BLE = torch.randn(1, 5, E, generator=draw, dtype=torch.float64, requires_grad=True)
    scale_E = torch.randn(E, generator=draw, dtype=torch.float64, requires_grad=True)
    settings = Router(activation="relu_rmsnorm", learned_scale=True)
    raw_BLE, found_BLE = gate_logits(logits_BLE, settings, {}, is_counted=True, scale_E=scale_E)
    assert torch.equal(raw_BLE, logits_BLE)
    for row, found in zip(logits_BLE[0].tolist(), found_BLE[0].tolist(), strict=True):
        positive = [max(x, 0.0) for x in row]
        rms = math.sqrt(sum(x * x for x in positive) / E + torch.finfo(torch.float64).eps)
        for e, x, value in zip(itertools.count(), positive, found):
            assert value == pytest.approx(x / rms * scale_E[e].item(), rel=EXACT)
    assert torch.autograd.gradcheck(
        lambda x, scale: activated(x, "relu_rmsnorm", scale), (logits_BLE, scale_E)
    )
