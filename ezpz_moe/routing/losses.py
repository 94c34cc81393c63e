"""Balance losses: what a router is trained on besides the model's own loss.

A host's router calls :func:`of_microbatch` and :func:`weighted`. The function of a loss returns one
value per *group* of tokens, differentiable in the scores or logits; float32, or float64 if they
are. Tokens come as [G, N, ...]. ``mask_GN`` is False for a padding token: no sum includes it, and
its gradient is exactly zero. A group without tokens has the loss 0.

A group may be spread over ranks: ``share`` then sums a tensor over them, and passes the gradient to
this rank's addend alone. The gradients of all ranks add up to that of the group's loss.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ezpz_moe.config.routing_schema import Balance

LOSSES = ("aux_loss", "mse_loss", "z_loss")
"""The losses by their keys of ``[balance]``, in the order of ``of_each_L``."""

Share = Callable[[Tensor], Tensor]


class OfMicrobatch(NamedTuple):
    """What :func:`of_microbatch` returns; the counters need all of it.

    Attributes:
        p_GNE: probabilities of the experts, for each token.
        counts_GE: assignments to each expert, of this rank's tokens alone.
        of_each_L: one value for each of ``LOSSES``, summed over groups, without its coefficient.
    """

    p_GNE: Tensor
    counts_GE: Tensor
    of_each_L: Tensor


def of_microbatch(
    logits_GNE: Tensor,
    scores_GNE: Tensor,
    ids_GNK: Tensor,
    mask_GN: Tensor,
    share: Share,
    *,
    routed_experts: int,
) -> OfMicrobatch:
    """Return all losses of a microbatch, and what they are made from.

    Args:
        logits_GNE: the gate's, before the scores.
        scores_GNE: of all experts.
        ids_GNK: the chosen experts.
        mask_GN: bool, False for padding.
        share: sums over the ranks of a group.
        routed_experts: how many of the E experts compute; the others come last.
    """
    E, K = scores_GNE.shape[-1], ids_GNK.shape[-1]
    p_GNE = probabilities(scores_GNE, mask_GN)
    n_G = tokens_in_group(mask_GN, share)
    counts_GE = assignments(ids_GNK, mask_GN, E)
    f_GE = share(counts_GE) / (n_G * K).unsqueeze(-1)
    if routed_experts < E:
        # Which zero-computation expert a token takes does not matter, so the loss must not favour
        # one.
        f_GE = merged_null_share(f_GE, routed_experts)
    P_GE = mean_probability(p_GNE, mask_GN, n_G, share)
    of_each_L = torch.stack(
        [
            switch_loss(f_GE, P_GE).sum(),
            mse_loss(P_GE).sum(),
            z_loss(logits_GNE, mask_GN, n_G, share).sum(),
        ]
    )
    return OfMicrobatch(p_GNE, counts_GE, of_each_L)


def weighted(of_each_L: Tensor, balance: Balance) -> Tensor:
    """Return the sum of the losses, each times its coefficient in ``[balance]``."""
    return (
        balance.aux_loss * of_each_L[0]
        + balance.mse_loss * of_each_L[1]
        + balance.z_loss * of_each_L[2]
    )


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
    """Return counts_GE, float32: how often each expert is chosen."""
    # scatter instead of bincount: shapes are static, the device is not read, and groups stay apart.
    chosen_GNE = torch.zeros(*mask_GN.shape, E, device=ids_GNK.device).scatter_(-1, ids_GNK, 1.0)
    return (chosen_GNE * mask_GN.unsqueeze(-1)).sum(1)


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
