"""Balance losses: what a router is trained on besides the model's own loss.

A host's router calls :func:`of_microbatch` for each scope of a loss, and :func:`weighted`. The
function of a loss returns one value per *group* of tokens, differentiable in the scores or logits;
float32, or float64 if they are. Tokens come as [G, N, ...]. ``mask_GN`` is False for a padding
token: no sum includes it, and its gradient is exactly zero. A group without tokens has the loss 0.

A group may be spread over ranks: ``share`` then sums a tensor over them, and passes the gradient to
this rank's addend alone. The gradients of all ranks add up to that of the group's loss.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ezpz_moe.config.routing_schema import LOSSES, Scope
from ezpz_moe.routing.neighbours import Neighbours, chunk_loss, locality_loss

Share = Callable[[Tensor], Tensor]


class Terms(NamedTuple):
    """What the formula of a loss may be made of.

    Attributes:
        f_GE: each expert's share of the group's assignments.
        P_GE: its mean probability.
        logits_GNE, mask_GN: of the group's tokens on this rank.
        n_G: the group's tokens on all its ranks, at least 1.
        share: sums over the ranks of a group.
        p_GNR: each token's probabilities of the R experts that compute.
        neighbours: which tokens are neighbours, and what of them is compared.
    """

    f_GE: Tensor
    P_GE: Tensor
    logits_GNE: Tensor
    mask_GN: Tensor
    n_G: Tensor
    share: Share
    p_GNR: Tensor
    neighbours: Neighbours


FORMULAS: dict[str, Callable[[Terms], Tensor]] = {
    "aux_loss": lambda of: switch_loss(of.f_GE, of.P_GE),
    "mse_loss": lambda of: mse_loss(of.P_GE),
    "z_loss": lambda of: z_loss(of.logits_GNE, of.mask_GN, of.n_G, of.share),
    "locality_loss": lambda of: locality_loss(of.neighbours, of.mask_GN, of.share),
    "chunk_loss": lambda of: chunk_loss(of.neighbours, of.p_GNR, of.mask_GN, of.share),
}
"""The formula of each loss by its key of ``[balance]``."""


def of_microbatch(
    logits_GNE: Tensor,
    p_GNE: Tensor,
    ids_GNK: Tensor,
    mask_GN: Tensor,
    share: Share,
    *,
    routed_experts: int,
    neighbours: Neighbours,
    computed: Collection[str],
) -> Tensor:
    """Return of_each_L: one value for each of ``LOSSES``, summed over groups, not weighted.

    Args:
        logits_GNE: the gate's, before the scores.
        p_GNE: :func:`probabilities` of all experts.
        ids_GNK: the experts that count as chosen, see :func:`counted_choice`; E is none of them.
        mask_GN: bool, False for padding.
        share: sums over the ranks of a group.
        routed_experts: how many of the E experts compute; the others come last.
        neighbours: of a sequence's tokens.
        computed: the losses to compute; the values of others are 0.
    """
    E = p_GNE.shape[-1]
    n_G = tokens_in_group(mask_GN, share)
    counts_GE = share(assignments(ids_GNK, mask_GN, E))
    # Not n K: tokens may choose fewer. At least 1, as a group of padding alone has none.
    f_GE = counts_GE / counts_GE.sum(-1, keepdim=True).clamp(min=1)
    if routed_experts < E:
        # Which zero-computation expert a token takes does not matter, so the loss must not favour
        # one.
        f_GE = merged_null_share(f_GE, routed_experts)
    P_GE = mean_probability(p_GNE, mask_GN, n_G, share)
    p_GNR = p_GNE[..., :routed_experts]
    terms = Terms(f_GE, P_GE, logits_GNE, mask_GN, n_G, share, p_GNR, neighbours)
    none = P_GE.new_zeros(())
    return torch.stack(
        [FORMULAS[loss](terms).sum() if loss in computed else none for loss in LOSSES]
    )


def weighted(
    of_scopes: Mapping[Scope, Tensor], coefficients: Mapping[Scope, Mapping[str, float]]
) -> Tensor:
    """Return the sum of the losses, each times its coefficient.

    Args:
        of_scopes: of_each_L by scope.
        coefficients: by scope and loss, at least one.
    """
    addends = [
        coefficient * of_scopes[scope][LOSSES.index(loss)]
        for scope, of_losses in coefficients.items()
        for loss, coefficient in of_losses.items()
    ]
    return torch.stack(addends).sum()


def counted_choice(ids_BLK: Tensor, scores_BLE: Tensor, *, by_scores: bool) -> Tensor:
    """Return the experts that :func:`switch_loss` counts as chosen, int64 [B, L, K].

    ``by_scores``: the K highest scores of all experts, whatever a selection bias or groups of
    experts have made of them. That is the count of DeepSeek-V3, arXiv 2412.19437, equation 18, and
    of Megatron-Core. Otherwise ``ids_BLK``, where the tokens go, as DeepSeek-V2 counts, arXiv
    2405.04434, equation 24, and NeMo Automodel and OLMo-core.
    """
    if not by_scores:
        return ids_BLK
    return scores_BLE.detach().topk(ids_BLK.shape[-1], dim=-1, sorted=False).indices


def alone(addend: Tensor) -> Tensor:
    """Return the addend: the ``share`` of a group that is on one rank."""
    return addend


def probabilities(scores_GNE: Tensor, mask_GN: Tensor) -> Tensor:
    """Turn scores over *all* experts into probabilities: softmax's unchanged, sigmoid's scaled.

    With the chosen experts' scores alone, the balance loss would not depend on the routing. A
    padding token gets zeros.
    """
    # Mask before dividing: for a padding token with NaN, the gradient would otherwise be 0 / NaN.
    scores_GNE = torch.where(mask_GN.unsqueeze(-1), _at_least_float32(scores_GNE), 0)
    # Softmax scores sum to 1 already, so this changes only sigmoid's. The clamp keeps a padding
    # token's zeros at 0 / 1e-20 = 0.
    return scores_GNE / scores_GNE.sum(-1, keepdim=True).clamp(min=1e-20)


def in_groups(values_BLX: Tensor, *, by_sequence: bool) -> Tensor:
    """Return [B, L, X] as [G, N, X], and [B, L] as [G, N]: a group per sequence, or one in all."""
    return values_BLX if by_sequence else values_BLX.flatten(0, 1).unsqueeze(0)


def tokens_in_group(mask_GN: Tensor, share: Share = alone) -> Tensor:
    """Return n_G, float32, at least 1: it divides a sum over the group's tokens into a mean."""
    # At least 1, so a group of padding alone has the mean 0 and not 0 / 0.
    return share(mask_GN.sum(-1).float()).clamp(min=1)


def assignments(ids_GNK: Tensor, mask_GN: Tensor, E: int) -> Tensor:
    """Return counts_GE, float32: how often each expert is chosen; the id E is that of none."""
    # scatter instead of bincount: shapes are static, the device is not read, and groups stay apart.
    chosen_GNF = torch.zeros(*mask_GN.shape, E + 1, device=ids_GNK.device)
    chosen_GNF.scatter_(-1, ids_GNK, 1.0)
    return (chosen_GNF[..., :E] * mask_GN.unsqueeze(-1)).sum(1)


def mean_probability(p_GNE: Tensor, mask_GN: Tensor, n_G: Tensor, share: Share = alone) -> Tensor:
    """Return P_GE: the mean probability of each expert over the group's tokens."""
    # share() before dividing: the mean of the ranks' means is not the mean over tokens when ranks
    # have different numbers of them.
    sums_GE = torch.where(mask_GN.unsqueeze(-1), p_GNE, 0).sum(1)
    return share(sums_GE) / n_G.unsqueeze(-1)


def switch_loss(f_GE: Tensor, P_GE: Tensor) -> Tensor:
    """Return loss_G = E * sum_i f_i P_i: 1 if even, E / K if the same K experts get everything.

    f is each expert's share of the assignments (it sums to 1 for any top-k, and has no gradient), P
    the mean probability. Source: Switch Transformers, arXiv 2101.03961, equation 4; with a sequence
    as the group DeepSeek-V3, arXiv 2412.19437, equation 17, without its factor alpha.
    """
    # Counting has no gradient: the loss acts through the probabilities alone.
    return f_GE.shape[-1] * (f_GE.detach() * P_GE).sum(-1)


def mse_loss(P_GE: Tensor) -> Tensor:
    """Return loss_G = mean_i (P_i - 1/E)^2: how far the mean probabilities are from even.

    Source: the expert-usage loss of NVIDIA NeMo's MagpieTTS mixture of experts.
    """
    # P sums to 1, so its mean is 1/E; or to 0 in a group without tokens, whose loss is 0.
    return (P_GE - P_GE.mean(-1, keepdim=True)).square().mean(-1)


def z_loss(logits_GNE: Tensor, mask_GN: Tensor, n_G: Tensor, share: Share = alone) -> Tensor:
    """Return loss_G = mean over tokens of logsumexp(logits)^2, which keeps logits small.

    Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    # Mask before squaring: for a padding token with NaN, the gradient would otherwise be NaN * 0.
    logits_GNE = torch.where(mask_GN.unsqueeze(-1), _at_least_float32(logits_GNE), 0)
    # Mask again: a padding token's logits are now zeros, and logsumexp of E zeros is ln E.
    squares_GN = logits_GNE.logsumexp(-1).square() * mask_GN
    return share(squares_GN.sum(-1)) / n_G


def merged_null_share(f_GE: Tensor, experts: int) -> Tensor:
    """Return f with the share of the zero-computation experts (from ``experts`` on) spread evenly.

    It does not matter which of them a token takes, so none is favoured over another.
    Source: AdaMoE, arXiv 2406.13233, equation 6.
    """
    zero_GZ = f_GE[..., experts:]
    even_GZ = zero_GZ.mean(-1, keepdim=True).expand_as(zero_GZ)
    return torch.cat([f_GE[..., :experts], even_GZ], dim=-1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
