"""The losses of a router, written out in float64: what a finding compares a framework's own with.

Legend: T = B L tokens, L in each of B sequences; E experts, k of them for a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

B, L, E = 2, 24, 8


def logits() -> Tensor:
    """Return logits_TE, float64, the same at every call; the first experts are favoured."""
    draw = torch.Generator().manual_seed(3)
    logits_TE = torch.randn(B * L, E, generator=draw, dtype=torch.float64)
    return (logits_TE + torch.linspace(1.5, -0.5, E)).requires_grad_()


def chosen(scores_TE: Tensor, k: int) -> Tensor:
    """Return chosen_TE: 1 for the k highest scores of a token, 0 for the others."""
    return torch.zeros_like(scores_TE).scatter(-1, scores_TE.topk(k, -1).indices, 1)


def probabilities(scores_TE: Tensor) -> Tensor:
    """Return p_TE: the scores of a token over their sum, which is 1 for softmax's already."""
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def switch_loss(p_TE: Tensor, chosen_TE: Tensor) -> Tensor:
    """Return E sum_e f_e P_e: f the shares of the choices, P the mean probabilities.

    It is 1 if the load is even. Source: Switch Transformers, arXiv 2101.03961, equation 4.
    """
    f_E = chosen_TE.detach().sum(0) / chosen_TE.sum()
    return E * (f_E * p_TE.mean(0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Return the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)."""
    return logits_TE.logsumexp(-1).square().mean()


class Ratio(NamedTuple):
    """A framework's loss over that of a formula.

    Attributes:
        value: of the two values.
        gradient: the factor that brings the formula's gradient closest to the framework's.
        rest: what that factor leaves of the framework's gradient, as a share of it.
    """

    value: float
    gradient: float
    rest: float

    def is_near(self, value: float, gradient: float) -> bool:
        """Tell whether the ratios are these, and nothing is left: frameworks compute in float32."""
        pairs = ((self.value, value), (self.gradient, gradient))
        return self.rest < 1e-5 and all(abs(seen / said - 1) < 1e-5 for seen, said in pairs)

    def __str__(self) -> str:
        rest = f", {self.rest:.0%} of it in another direction" if self.rest > 1e-5 else ""
        return f"value {self.value:.4f}, gradient {self.gradient:.4f} of the formula's{rest}"


def ratio(value: Tensor, gradient_X: Tensor, formula: Tensor, of_X: Tensor) -> Ratio:
    """Compare a framework's value and gradient in ``of_X`` with those of a formula."""
    ours_X = _gradient(formula, of_X)
    best = (gradient_X * ours_X).sum() / ours_X.square().sum()
    rest = (gradient_X - best * ours_X).norm() / gradient_X.norm()
    return Ratio(*(each.item() for each in (value / formula, best, rest)))


def ratio_of(theirs: Tensor, formula: Tensor, of_X: Tensor) -> Ratio:
    """Compare a loss that a framework returns with a formula."""
    return ratio(theirs, _gradient(theirs, of_X), formula, of_X)


def ratio_through(value: Tensor, weights: Tensor, formula: Tensor, of_X: Tensor) -> Ratio:
    """Compare a loss that a framework does not return, but adds to the gradient of ``weights``."""
    return ratio(value, _gradient(0 * weights.sum(), of_X), formula, of_X)


def _gradient(loss: Tensor, of_X: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of_X, retain_graph=True)[0]
