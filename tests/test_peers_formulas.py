"""Balance losses of other frameworks, in float64, and the factors of docs/guides/moving.md.

Each formula is what the framework's own function computed when it was run (the versions are in
docs/guides/moving.md), in our words and with plain sums; no framework is needed here,
except transformers, which the tests have. Ours is multiplied by the factor, and value and gradient
have to agree.

Bound: ours is exact in float64 but for f, a quotient of two small whole numbers in float32, which
is off by a share of U. The value and every term of the gradient are linear in f. With p = s / sum
s, the sum over experts of |dp_e / dlogit| is at most 2, so a token's gradient is off by no more
than 2 U max(E f) / n; twice that is allowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from routing_cases import U
from torch import Tensor

from ezpz_moe.config.foreign_keys import projects
from ezpz_moe.routing import losses
from ezpz_moe.routing.assignment import limited_to_groups, sinkhorn
from ezpz_moe.routing.capacity import beyond_capacity, capacity
from ezpz_moe.routing.neighbours import Neighbours

B, L, E = 2, 24, 8
LAYERS = 16


@dataclass(frozen=True)
class Case:
    """A microbatch; ``ids_TK`` are where its tokens go, and the mask is False for padding."""

    logits_TE: Tensor
    mask_T: Tensor
    score: str
    K: int
    bias_E: Tensor

    @property
    def scores_TE(self) -> Tensor:
        return self.logits_TE.softmax(-1) if self.score == "softmax" else self.logits_TE.sigmoid()

    @property
    def ids_TK(self) -> Tensor:
        return (self.scores_TE + self.bias_E).topk(self.K, -1).indices

    def sequences(self) -> list[Case]:
        cuts = zip(self.logits_TE.split(L), self.mask_T.split(L), strict=True)
        return [replace(self, logits_TE=logits, mask_T=mask) for logits, mask in cuts]


KINDS = ("even", "collapsed", "biased", "padded")


def make(kind: str, score: str = "softmax", K: int = 2) -> Case:
    draw = torch.Generator().manual_seed(3)
    logits_TE = torch.randn(B * L, E, generator=draw, dtype=torch.float64)
    if kind == "even":
        logits_TE *= 0.01
        for t in range(B * L):
            for k in range(K):
                logits_TE[t, (t * K + k) % E] += 3 - k / 2
    if kind == "collapsed":
        logits_TE[:, 1] += 6
        logits_TE[:, 4] += 5
    mask_T = torch.ones(B * L, dtype=torch.bool)
    if kind == "padded":
        mask_T[L - 5 : L] = mask_T[2 * L - 13 :] = False
    bias_E = torch.linspace(-0.4, 0.4, E, dtype=torch.float64) * (kind == "biased")
    return Case(logits_TE.requires_grad_(), mask_T, score, K, bias_E)


def unbiased(case: Case) -> Case:
    return replace(case, bias_E=torch.zeros_like(case.bias_E))


def unmasked(case: Case) -> Case:
    return replace(case, mask_T=torch.ones_like(case.mask_T))


def ours(case: Case, scope: str, name: str = "aux_loss", *, choice: str = "routed") -> Tensor:
    """The loss of a microbatch, with the mean over its groups, as the router adds it.

    ``choice`` is ``aux_loss_choice``.
    """

    def groups(values: Tensor) -> Tensor:
        return losses.in_groups(values.unflatten(0, (B, L)), by_sequence=scope == "sequence")

    mask_T1 = case.mask_T.unsqueeze(-1)
    ids_TK = losses.counted_choice(case.ids_TK, case.scores_TE, by_scores=choice == "scores")
    logits, scores, ids, mask = map(groups, (case.logits_TE, case.scores_TE, ids_TK, mask_T1))
    mask = mask.squeeze(-1)
    p = losses.probabilities(scores, mask)
    of_each_L = losses.of_microbatch(
        logits,
        p,
        ids,
        mask,
        losses.alone,
        routed_experts=E,
        neighbours=Neighbours(logits, L, 2),
        computed=(name,),
    )
    return of_each_L[losses.LOSSES.index(name)] / len(logits)


def assert_same(theirs: Tensor, mine: Tensor, factor: float, case: Case) -> None:
    n = int(case.mask_T.sum()) / B
    worst = E * factor / min(case.K, E)  # E f of an expert that every token has
    assert abs(theirs.item() - factor * mine.item()) <= 2 * U * worst
    (of_theirs,) = torch.autograd.grad(theirs, case.logits_TE, retain_graph=True)
    (of_mine,) = torch.autograd.grad(mine, case.logits_TE, retain_graph=True)
    shortest = min(n, min(int(each.mask_T.sum()) for each in case.sequences()))
    assert (of_theirs - factor * of_mine).abs().max() <= 4 * U * worst / shortest


def off_by(theirs: Tensor, mine: Tensor, case: Case) -> float:
    """How far the gradients are apart, relative to ours, whatever factor ours is given."""
    (a,) = torch.autograd.grad(theirs, case.logits_TE, retain_graph=True)
    (b,) = torch.autograd.grad(mine, case.logits_TE, retain_graph=True)
    best = (a * b).sum() / (b * b).sum()
    return ((a - best * b).norm() / a.norm()).item()


# The formulas -------------------------------------------------------------------------------------


def counted(ids_TK: Tensor, mask_T: Tensor) -> Tensor:
    """How many unpadded tokens chose each expert, in plain Python."""
    counts = [0.0] * E
    for ids, counts_too in zip(ids_TK.tolist(), mask_T.tolist(), strict=True):
        for each in ids if counts_too else ():
            counts[each] += 1
    return torch.tensor(counts, dtype=torch.float64)


def normalized(case: Case) -> Tensor:
    return case.scores_TE / case.scores_TE.sum(-1, keepdim=True)


def summed(p_TE: Tensor, case: Case) -> Tensor:
    return (p_TE * case.mask_T.unsqueeze(-1)).sum(0)


def megatron_aux(case: Case) -> Tensor:
    """E / (k T^2) sum_e (sum of p) (choices without the bias), T without padding."""
    T = case.mask_T.sum()
    counts_E = counted(unbiased(case).ids_TK, case.mask_T)
    return E / (case.K * T * T) * (summed(normalized(case), case) * counts_E).sum()


def megatron_seq(case: Case) -> Tensor:
    """The same for each sequence, and the mean; T is the mean number of tokens of all sequences."""
    T = case.mask_T.sum() / B
    parts = [
        E
        / (case.K * T * T)
        * (summed(normalized(each), each) * counted(unbiased(each).ids_TK, each.mask_T)).sum()
        for each in case.sequences()
    ]
    return torch.stack(parts).mean()


def megatron_global(case: Case) -> Tensor:
    """The same, with a rank for each sequence: its p, the choices and T of all, mean over ranks."""
    T = case.mask_T.sum()
    counts_E = counted(unbiased(case).ids_TK, case.mask_T)
    ranks = [summed(normalized(each), each) for each in case.sequences()]
    return torch.stack([E / (case.K * T * T) * (p_E * counts_E).sum() for p_E in ranks]).mean()


def automodel(case: Case) -> Tensor:
    """sum_e (E choices / (k T)) (mean of p), with the bias and without padding."""
    T = case.mask_T.sum()
    f_E = counted(case.ids_TK, case.mask_T) * E / (case.K * T)
    return (f_E * summed(normalized(case), case) / T).sum()


def automodel_raw_scores(case: Case) -> Tensor:
    """As it is for sigmoid scores with norm_topk_prob = false."""
    T = case.mask_T.sum()
    f_E = counted(case.ids_TK, case.mask_T) * E / (case.K * T)
    return (f_E * summed(case.scores_TE, case) / T).sum()


def deepspeed(case: Case) -> Tensor:
    """E^2 / k times the mean over experts of (mean of p) (choices / T); padding counts."""
    case = unmasked(case)
    ce_E = counted(unbiased(case).ids_TK, case.mask_T) / (B * L)
    return (case.scores_TE.mean(0) * ce_E).mean() * E * E / case.K


def deepspeed_top2(case: Case) -> Tensor:
    """With k = 2, the choices are the first ones alone, and k is 1."""
    return deepspeed(replace(case, K=1))


def olmo_local(case: Case) -> Tensor:
    """E / k sum_e choices (mean of p) / (tokens with a label), over the layers; padding counts."""
    counts_E = counted(case.ids_TK, torch.ones_like(case.mask_T))
    loss = (counts_E * normalized(case).mean(0)).sum() / case.mask_T.sum()
    return E / case.K * loss / LAYERS


def olmo_instance(case: Case) -> Tensor:
    """The same, with the mean of p of each sequence."""
    parts = [
        (counted(each.ids_TK, torch.ones_like(each.mask_T)) * normalized(each).mean(0)).sum()
        for each in case.sequences()
    ]
    return E / case.K * torch.stack(parts).sum() / case.mask_T.sum() / LAYERS


def deepseek_alpha(case: Case) -> Tensor:
    """sum_e E choices / (k T) (mean of p) of each sequence, and the mean (arXiv 2412.19437)."""
    return torch.stack([automodel(each) for each in case.sequences()]).mean()


def transformers_pooled(case: Case) -> Tensor:
    """E sum_e (choices / T) (mean of p): not divided by k."""
    T = case.mask_T.sum()
    counts_E = counted(unbiased(case).ids_TK, case.mask_T)
    return E * (counts_E / T * summed(case.scores_TE, case) / T).sum()


def z_of_tokens(case: Case) -> Tensor:
    squares_T = case.logits_TE.exp().sum(-1).log().square()
    return squares_T[case.mask_T].mean()


class Peer(NamedTuple):
    """A peer's loss: our scope and ``aux_loss_choice``, and the factor on ours that gives theirs.

    ``except_for`` is a kind of routing that no factor makes ours; those have tests of their own.
    """

    formula: Callable[[Case], Tensor]
    scope: str
    factor: float = 1
    choice: str = "routed"
    counts_padding: bool = False
    softmax_only: bool = False
    except_for: str = ""


PEERS = {
    "megatron aux_loss": Peer(megatron_aux, "batch", choice="scores"),
    "megatron seq_aux_loss": Peer(megatron_seq, "sequence", choice="scores", except_for="padded"),
    "megatron global_aux_loss": Peer(megatron_global, "batch", 1 / B, choice="scores"),
    "automodel": Peer(automodel, "batch"),
    "deepspeed top-k": Peer(
        deepspeed, "batch", choice="scores", counts_padding=True, softmax_only=True
    ),
    "olmo local_batch": Peer(olmo_local, "batch", 1 / LAYERS, except_for="padded"),
    "olmo instance": Peer(olmo_instance, "sequence", 1 / LAYERS, except_for="padded"),
    "deepseek alpha": Peer(deepseek_alpha, "sequence"),
    "transformers, one layer": Peer(
        transformers_pooled, "batch", 2, choice="scores", softmax_only=True
    ),
}


@pytest.mark.parametrize(
    ("peer", "kind", "score"),
    [
        (name, kind, score)
        for (name, peer), kind, score in itertools.product(
            PEERS.items(), KINDS, ("softmax", "sigmoid")
        )
        if kind != peer.except_for and not (peer.softmax_only and score == "sigmoid")
    ],
)
def test_with_its_factor_ours_is_theirs(peer: str, kind: str, score: str) -> None:
    formula, scope, factor, *_ = of_peer = PEERS[peer]
    case = make(kind, score)
    mine = unmasked(case) if of_peer.counts_padding else case
    assert_same(formula(case), ours(mine, scope, choice=of_peer.choice), factor, case)


@pytest.mark.parametrize("K", [1, 3, 4])
def test_deepspeed_is_ours_for_top_1_and_from_top_3_on(K: int) -> None:
    case = make("collapsed", K=K)
    assert_same(deepspeed(case), ours(case, "batch"), 1, case)


@pytest.mark.parametrize("kind", KINDS)
def test_the_z_loss_of_all_of_them_is_ours(kind: str) -> None:
    case = make(kind)
    torch.testing.assert_close(ours(case, "batch", "z_loss"), z_of_tokens(case), rtol=1e-13, atol=0)


def test_the_factors_of_the_table_are_these() -> None:
    """What a user reads in docs/guides/moving.md, hints and convert; the others are the same."""
    rows = [row for project in projects().values() for row in project.keys if row.is_coefficient]
    assert {row.key: row.factor for row in rows if row.factor} == {
        "lb_loss_weight": "1 / n_layers",
        "z_loss_weight": "1 / n_layers",
        "router_aux_loss_coef": "top-k / MoE layers",
    }
    (of_megatron,) = (row for row in rows if row.key == "moe_aux_loss_coeff")
    assert "for `global_aux_loss` times 1 / data-parallel ranks" in of_megatron.note


# What no factor makes ours ------------------------------------------------------------------------


def test_choices_with_and_without_the_bias_are_two_losses() -> None:
    """Megatron's is "scores", Automodel's "routed"; no factor makes one the other."""
    case = make("biased")
    assert off_by(megatron_aux(case), ours(case, "batch", choice="routed"), case) > 0.8
    assert off_by(automodel(case), ours(case, "batch", choice="scores"), case) > 0.8


def test_megatrons_sequences_are_divided_by_their_mean_length() -> None:
    case = make("padded")
    assert off_by(megatron_seq(case), ours(case, "sequence"), case) > 0.2


def test_deepspeed_top_2_is_top_1_of_ours() -> None:
    case = make("collapsed")
    assert off_by(deepspeed_top2(case), ours(case, "batch"), case) > 0.5
    assert_same(deepspeed_top2(case), ours(replace(case, K=1), "batch"), 1, case)


def test_automodels_raw_sigmoid_scores_are_no_probabilities() -> None:
    case = make("collapsed", "sigmoid")
    assert off_by(automodel_raw_scores(case), ours(case, "batch"), case) > 0.5


def test_olmos_padding_stands_in_the_sums_and_not_in_the_divisor() -> None:
    case = make("padded")
    factor = B * L / int(case.mask_T.sum()) / LAYERS
    assert_same(olmo_local(case), ours(unmasked(case), "batch"), factor, unmasked(case))


def test_transformers_is_top_k_over_layers_where_layers_are_alike() -> None:
    """Its own function: with L equal layers, L of our losses times K / L."""
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    case = make("collapsed")
    theirs = modeling.load_balancing_loss_func((case.logits_TE,) * LAYERS, E, case.K)
    per_layer = ours(case, "batch")
    factor = case.K / LAYERS
    # Its sums over LAYERS * T tokens are in float32.
    bound = (LAYERS * B * L + 4) * U
    assert theirs.item() == pytest.approx(factor * LAYERS * per_layer.item(), rel=bound)
    one_sided = (case.logits_TE, -case.logits_TE)
    pooled = modeling.load_balancing_loss_func(one_sided, E, case.K).item() / case.K
    assert pooled < 0.9 * per_layer.item()  # one layer makes up for the other


# Routers ------------------------------------------------------------------------------------------


def test_softmax_over_the_chosen_is_normalized_softmax() -> None:
    """Of Megatron-Core and Automodel by default; what router_route_norm does is in the host."""
    case = make("padded")
    chosen_TK = case.logits_TE.gather(-1, case.ids_TK).softmax(-1)
    scores_TK = case.scores_TE.gather(-1, case.ids_TK)
    torch.testing.assert_close(chosen_TK, scores_TK / scores_TK.sum(-1, keepdim=True))


@pytest.mark.parametrize(("limited", "score"), [(1, "topk_sum"), (2, "top2_sum"), (4, "topk_sum")])
def test_megatrons_groups_are_ranked_by_top_k_over_groups(limited: int, score: str) -> None:
    """The sum of each group's best K / limited scores; of 4 groups of 4 experts."""
    K, T = 4, 64
    scores_TE = torch.rand(T, 16, generator=torch.Generator().manual_seed(0)).double()
    best = K // limited
    for t in range(T):
        ranks = [sum(sorted(group.tolist())[-best:]) for group in scores_TE[t].split(4)]
        allowed = sorted(range(4), key=ranks.__getitem__)[-limited:]
        mine_E = limited_to_groups(
            scores_TE[t : t + 1], groups=4, limited=limited, group_score=score, top_k=K
        )[0]
        found = {int(e) // 4 for e in mine_E.isfinite().nonzero()}
        assert found == set(allowed)


@pytest.mark.parametrize("policy", ["probability", "last"])
@pytest.mark.parametrize("factor", [0.5, 1.25])
def test_a_capacity_of_the_peers_drops_the_same_tokens(factor: float, policy: str) -> None:
    """An expert takes C = ceil(factor K T / E) tokens: Megatron-Core, and DeepSpeed from top-3 on.

    They keep the highest weights, or the first tokens, expert by expert.
    """
    case = make("collapsed", K=3)
    T = len(case.scores_TE)
    weights_TK = case.scores_TE.detach().gather(-1, case.ids_TK)
    C = math.ceil(factor * case.K * T / E)
    assert capacity(case.K * T, E, factor=factor, least=1) == C
    out_TK = beyond_capacity(
        case.ids_TK, weights_TK, experts=E, capacity=C, by_weight=policy == "probability"
    )
    assert 0 < out_TK.sum() < out_TK.numel()
    for e in range(E):
        sent = [(t, k) for t, k in (case.ids_TK == e).nonzero().tolist()]
        if policy == "probability":
            sent.sort(key=lambda place: -weights_TK[place].item())
        assert {place for place in sent if not out_TK[place]} == set(sent[:C])


@pytest.mark.parametrize(("score", "differ"), [("softmax", 0.0), ("sigmoid", 0.05)])
def test_megatrons_sinkhorn_is_ours_for_softmax_alone(score: str, differ: float) -> None:
    """It scales exp(logits) until rows and columns are even, whatever the score function is."""
    logits_TE = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)).double()
    plan_TE = logits_TE.exp()
    for _ in range(200):
        plan_TE = plan_TE / plan_TE.sum(1, keepdim=True)
        plan_TE = plan_TE / plan_TE.sum(0)
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    mine_TE = sinkhorn(scores_TE, torch.ones(512, dtype=torch.bool), 1e-9, 200)
    chosen = [each.topk(2).indices.sort(-1).values for each in (plan_TE, mine_TE)]
    share = (chosen[0] != chosen[1]).any(-1).double().mean().item()
    assert share == 0 if not differ else share > differ
