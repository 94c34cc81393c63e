"""Ways to score and choose experts other than the host's.

A host's router calls :func:`chosen`, which does what ``[router]`` asks for. :func:`scores_of` and
:func:`limited_to_groups` stand in for the host's own, where a flavor has scores that it lacks.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.config.routing_schema import Router


class HostRules(NamedTuple):
    """What the host's router does with scores, and what other choices have to do as well.

    Attributes:
        norm: whether a token's weights are divided by their sum.
        scale: what they are multiplied by.
        limited: sets scores outside of a token's groups of experts to -inf; None without groups.
    """

    norm: bool
    scale: float
    limited: Callable[[Tensor], Tensor] | None


def chosen(
    weights_BLK: Tensor,
    ids_BLK: Tensor,
    scores_BLE: Tensor,
    mask_BL: Tensor,
    settings: Router,
    rules: HostRules,
    *,
    training: bool,
) -> tuple[Tensor, Tensor]:
    """Return weights_BLK and ids_BLK as the options want them, given the host's own choice.

    Device syncs: those of sinkhorn, in training.
    """
    if settings.routing == "balanced":
        return _in_turn(weights_BLK, mask_BL, scores_BLE.shape[-1], settings, rules)
    # In training only: a plan depends on the other tokens of the batch, which at inference would
    # include later ones.
    if settings.routing == "sinkhorn" and training:
        return _by_sinkhorn(scores_BLE, mask_BL, ids_BLK.shape[-1], settings, rules)
    return weights_BLK, ids_BLK


def _in_turn(
    weights_BLK: Tensor, mask_BL: Tensor, E: int, settings: Router, rules: HostRules
) -> tuple[Tensor, Tensor]:
    K, first = weights_BLK.shape[-1], settings.skip_first_n_experts
    even_TK = balanced_experts(turns(mask_BL.flatten()), K, E, first=first)
    # Constant weights: a balanced choice says nothing about the token, so no gradient should
    # reach the gate through it.
    weights_TK = torch.full_like(weights_BLK, rules.scale / K).flatten(0, -2)
    if settings.noise:
        even_TK, weights_TK = perturbed(even_TK, weights_TK, noise=settings.noise, E=E, first=first)
    return weights_TK.view_as(weights_BLK), even_TK.view_as(weights_BLK)


def _by_sinkhorn(
    scores_BLE: Tensor, mask_BL: Tensor, K: int, settings: Router, rules: HostRules
) -> tuple[Tensor, Tensor]:
    plan_TE = sinkhorn(
        scores_BLE.detach().flatten(0, -2).float(),
        mask_BL.flatten(),
        settings.sinkhorn_tolerance,
        settings.sinkhorn_iterations,
    )
    plan_BLE = plan_TE.view_as(scores_BLE)
    if rules.limited is not None:
        plan_BLE = rules.limited(plan_BLE)
    ids_BLK = plan_BLE.topk(K, dim=-1, sorted=False).indices
    # The row of a padding token is zeros, whose top-k would be the same experts for all of them.
    even_TK = balanced_experts(turns(mask_BL.flatten()), K, scores_BLE.shape[-1], first=0)
    ids_BLK = torch.where(mask_BL.unsqueeze(-1), ids_BLK, even_TK.view_as(ids_BLK))
    # The plan only chooses. Weights come from the scores, which have a gradient.
    return weights_of(scores_BLE, ids_BLK, rules), ids_BLK


def weights_of(scores_BLE: Tensor, ids_BLK: Tensor, rules: HostRules) -> Tensor:
    """Return weights_BLK, differentiable in the scores: the host's for the same choice."""
    weights_BLK = scores_BLE.gather(-1, ids_BLK)
    if rules.norm:
        # 1e-20 as in the host.
        weights_BLK = weights_BLK / (weights_BLK.sum(-1, keepdim=True) + 1e-20)
    return weights_BLK * rules.scale


def scores_of(logits_BLE: Tensor, score_func: str) -> Tensor:
    """Return the scores of the gate's logits, in at least float32.

    ``sqrtsoftplus`` is the square root of softplus: above 0 and without an upper bound. Source:
    DeepSeek-V4, technical report, section 2.

    Raises:
        ValueError: unknown function.
    """
    logits_BLE = logits_BLE.to(torch.promote_types(logits_BLE.dtype, torch.float32))
    match score_func:
        case "identity":
            return logits_BLE
        case "softmax":
            return logits_BLE.softmax(-1)
        case "sigmoid":
            return logits_BLE.sigmoid()
        case "sqrtsoftplus":
            # clamp: where softplus underflows, the root's gradient would be infinite, times zero.
            least = torch.finfo(logits_BLE.dtype).tiny
            return F.softplus(logits_BLE).clamp(min=least).sqrt()
    raise ValueError(
        f"router_score_func: {score_func!r} is not one of softmax, sigmoid, sqrtsoftplus, identity"
    )


def limited_to_groups(
    scores_BLE: Tensor, *, groups: int, limited: int, group_score: str, top_k: int
) -> Tensor:
    """Return the scores with -inf outside of a token's best groups of experts.

    Args:
        scores_BLE: what experts are chosen by: the scores, with the bias if there is one.
        groups: how many there are, of equal size. A group may be one expert.
        limited: how many of them a token may use.
        group_score: what a group is ranked by. ``"top2_sum"`` of its two best experts is
            DeepSeek-V3's (arXiv 2412.19437), ``"max"`` DeepSeek-V2's (arXiv 2405.04434, section
            2.2.2); ``"topk_sum"`` adds up as many as each of the limited groups would give on
            average, ``top_k / limited``, like Megatron-Core.
        top_k: experts per token.
    """
    grouped_BLGe = scores_BLE.unflatten(-1, (groups, -1))
    best = ranking_experts(group_score, top_k=top_k, limited=limited, size=grouped_BLGe.shape[-1])
    of_groups_BLG = grouped_BLGe.topk(best, dim=-1).values.sum(-1)
    ids_BLg = of_groups_BLG.topk(limited, dim=-1, sorted=False).indices
    is_out_BLG = torch.ones_like(of_groups_BLG, dtype=torch.bool).scatter_(-1, ids_BLg, False)
    return grouped_BLGe.masked_fill(is_out_BLG.unsqueeze(-1), -torch.inf).flatten(-2)


def ranking_experts(group_score: str, *, top_k: int, limited: int, size: int) -> int:
    """Return how many of its ``size`` experts, the best ones, a group is ranked by."""
    return min({"top2_sum": 2, "max": 1, "topk_sum": max(1, top_k // limited)}[group_score], size)


@torch.library.custom_op("ezpz_moe::sinkhorn", mutates_args=())
def sinkhorn(scores_TE: Tensor, mask_T: Tensor, tolerance: float, iterations: int) -> Tensor:
    """Scale rows and columns until every token has the weight 1/T and every expert 1/E.

    The doubly stochastic scaling of Sinkhorn and Knopp. Its fixed point does not depend on a factor
    per row, so softmax scores do as well as exponentials of logits. It is one opaque operator,
    because the number of iterations depends on the values; it only chooses, so it needs no
    gradient.

    Source: BASE layers, arXiv 2103.16716; S-BASE in Clark et al., arXiv 2202.01169, section 3.2.

    Args:
        scores_TE: positive scores, float32 or float64.
        mask_T: bool, False for a token that must not count (padding), whatever its scores are; its
            row is zero.
        tolerance: iterations end when the experts' weights differ by no more than this, relatively.
            An expert whose scores are all zero does not count.
        iterations: the most iterations to run.

    Returns:
        A new tensor like ``scores_TE``. Device syncs: one in each iteration.
    """
    # where, not a product with the mask: a padding token's scores may be NaN.
    plan_TE = torch.where(mask_T.unsqueeze(-1), scores_TE, 0)
    E, tiny = scores_TE.shape[-1], torch.finfo(scores_TE.dtype).tiny
    # Scale the plan itself: separate factors would grow without bound if zero scores leave no even
    # plan. Each token is first scaled to 1, which makes tokens equal before the experts' turn.
    for _ in range(iterations):
        # clamp: a row of zeros (padding) stays zero instead of becoming 0 / 0.
        plan_TE.div_(plan_TE.sum(1, keepdim=True).clamp(min=tiny))
        # Measured after the rows were scaled and before the columns are: an even load here means
        # that both conditions hold.
        load_E = plan_TE.sum(0)
        plan_TE.div_((E * load_E).clamp(min=tiny))
        # An expert whose scores are all zero never gets weight. It would keep the loop running.
        least = torch.where(load_E > 0, load_E, torch.inf).amin()
        if bool(load_E.amax() <= (1 + tolerance) * least):
            break
    return plan_TE


@sinkhorn.register_fake
def _(scores_TE: Tensor, mask_T: Tensor, tolerance: float, iterations: int) -> Tensor:
    return torch.empty_like(scores_TE)


def turns(mask_T: Tensor) -> Tensor:
    """Return turn_T, int64: each token's number among those that count, or among the padding.

    Both have turns of their own, so that each is even however they are mixed.
    """
    return torch.where(mask_T, mask_T.cumsum(0), (~mask_T).cumsum(0)) - 1


def balanced_experts(turn_T: Tensor, K: int, E: int, *, first: int) -> Tensor:
    """Return ids_TK, int64: experts ``first`` to E in turn.

    The loads of tokens with the turns 0, 1, 2, ... differ by at most one token.

    Args:
        turn_T: int64, each token's turn.
        K: experts per token, at most ``E - first``.
        E: experts.
        first: experts before this one get nothing.
    """
    # A token's K slots are consecutive numbers, so its experts are distinct: K <= E - first.
    slots_TK = K * turn_T.unsqueeze(-1) + torch.arange(K, device=turn_T.device)
    return first + slots_TK % (E - first)


def popularity(K: int, E: int, *, device: torch.device | None = None) -> Tensor:
    """Return share_E, float32: how many of a random token's K choices each expert gets.

    It rises evenly, from next to nothing to twice the mean K/E, so that the coefficient of
    variation is sqrt((1 - 1/E^2) / 3), 0.58. Where K is more than half of E it rises less, as no
    expert can be chosen twice.
    """
    slope = 1.0 if 2 * K <= E else (E / K - 1) * E / max(E - 1, 1)
    from_middle_E = (2 * torch.arange(E, device=device) + 1 - E) / E
    return (K / E) * (1 + slope * from_middle_E.float())


def popular_experts(T: int, K: int, E: int, *, device: torch.device | None = None) -> Tensor:
    """Return ids_TK, int64: K distinct experts for each token, at random by their popularity.

    Systematic sampling, with the experts in a random order for each token: unlike K draws without
    replacement it chooses every expert exactly as often as :func:`popularity` says, on average.

    Source: Madow, On the theory of systematic sampling II, 1949.
    """
    # The popularities, laid end to end, reach from 0 to K. Whole steps from a random start hit K
    # experts, each once, as none is wider than a step.
    draw_TE, order_TE = torch.rand(T, E, device=device).sort(-1)
    ends_TE = popularity(K, E, device=device)[order_TE].cumsum(-1)
    steps_TE = (ends_TE - torch.rand(T, 1, device=device)).floor()
    hits_TE = steps_TE.diff(dim=-1, prepend=steps_TE.new_full((T, 1), -1)).clamp(max=1)
    # Roundings may hit one twice or miss the last: topk makes it K of them, all distinct.
    return order_TE.gather(-1, (hits_TE + draw_TE).topk(K, dim=-1).indices)


def perturbed(
    ids_TK: Tensor, weights_TK: Tensor, *, noise: float, E: int, first: int
) -> tuple[Tensor, Tensor]:
    """Replace each token's experts by popular ones with probability ``noise``, and move weights.

    The load's coefficient of variation is then ``noise`` times that of :func:`popularity`. With 1,
    every token gets random, distinct experts, and weights drawn evenly and scaled to their former
    sum; with 0, nothing changes.

    Args:
        ids_TK: int64 expert ids.
        weights_TK: their weights, floating.
        noise: in [0, 1].
        E: experts.
        first: experts before this one are never drawn.
    """
    T, K = ids_TK.shape
    random_TK = first + popular_experts(T, K, E - first, device=ids_TK.device)
    is_random_T1 = torch.rand(T, 1, device=ids_TK.device) < noise
    uneven_TK = torch.rand_like(weights_TK)
    uneven_TK = uneven_TK / uneven_TK.sum(-1, keepdim=True) * weights_TK.sum(-1, keepdim=True)
    return (
        torch.where(is_random_T1, random_TK, ids_TK),
        torch.lerp(weights_TK, uneven_TK, noise),
    )
