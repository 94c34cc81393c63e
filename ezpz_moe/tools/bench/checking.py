"""Whether a contender computes its layer: a wrong one is not timed.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ezpz_moe.compute.dispatch import row_order
from ezpz_moe.compute.plain import plain_loop
from ezpz_moe.compute.reference import Case
from ezpz_moe.tools.bench.contender import Contender, Prepared
from ezpz_moe.tools.bench.routed_case import RoutedCase

# Relative to the norm of the output. Wide, because this finds wrong layers; `ezpz-moe verify`
# judges rounding.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_TOLERANCE_OF_HALF = 3e-2


class WrongOutputError(RuntimeError):
    """A contender computes something else."""


class Truth(ABC):
    """What a layer's output has to be.

    Attributes:
        grad: the gradient that arrives at the output.
    """

    grad: Tensor

    @abstractmethod
    def dropped(self, contender: Contender, prepared: Prepared, output: Tensor) -> float:
        """Return the share of rows left out; 0 unless it may drop. All others have to be right.

        Args:
            output: what ``prepared.forward()`` has returned, with its graph.

        Raises:
            WrongOutputError: the output differs by more than rounding explains.
        """


def truth_of(case: Case | RoutedCase) -> Truth:
    return _Experts(case) if isinstance(case, Case) else _Routed(case)


class _Experts(Truth):
    """Inputs are random: a row that was computed is not zero."""

    @torch.no_grad()
    def __init__(self, case: Case) -> None:
        self.grad = case.grad_y_RD
        self.true_RD = case.apply(plain_loop, *case.inputs)

    def dropped(self, contender: Contender, prepared: Prepared, output: Tensor) -> float:
        kept_R1 = torch.ones_like(self.true_RD[:, :1])
        if contender.may_drop:
            kept_R1 = output.any(dim=1, keepdim=True).to(kept_R1.dtype)
        _compare(output.detach(), self.true_RD, kept_R1)
        return 1 - kept_R1.float().mean().item()


class _Routed(Truth):
    """Inputs are random: the score of a row that was computed has a gradient that is not zero."""

    @torch.no_grad()
    def __init__(self, case: RoutedCase) -> None:
        self.grad = case.grad_out_TD
        # Every device multiplies float32 well, which a half dtype's sum needs besides.
        case = case.to(torch.promote_types(case.x_TD.dtype, torch.float32))
        self.order_R = row_order(case.ids_TK, case.ids_TK.numel())
        self.token_R = self.order_R // case.ids_TK.shape[1]
        x_RD, counts_E = case.x_TD[self.token_R], case.num_tokens_per_expert_E
        y_RD = plain_loop(*case.weights, x_RD, counts_E, **case.options)
        self.weighted_RD = y_RD.mul_(case.scores_TK.flatten()[self.order_R, None])

    def dropped(self, contender: Contender, prepared: Prepared, output: Tensor) -> float:
        kept_R1 = torch.ones_like(self.weighted_RD[:, :1])
        if contender.may_drop:
            (grad_scores_TK,) = torch.autograd.grad(
                output, prepared.inputs[-1:], self.grad.to(output.dtype)
            )
            kept_R = grad_scores_TK.flatten()[self.order_R] != 0
            kept_R1 = kept_R.unsqueeze(1).to(kept_R1.dtype)
        true_TD = torch.zeros_like(self.grad, dtype=self.weighted_RD.dtype)
        true_TD.index_add_(0, self.token_R, self.weighted_RD * kept_R1)
        _compare(output.detach(), true_TD)
        return 1 - kept_R1.mean().item()


def _compare(output: Tensor, true: Tensor, kept: Tensor | None = None) -> None:
    """Raise WrongOutputError unless ``output`` is ``true``, of which only ``kept`` counts."""
    if output.shape != true.shape:
        raise WrongOutputError(f"its output is {tuple(output.shape)}, not {tuple(true.shape)}")
    limit = _TOLERANCE.get(output.dtype, _TOLERANCE_OF_HALF)
    wide = torch.promote_types(output.dtype, torch.float32)
    output, true = output.to(wide), true.to(wide)
    if kept is not None:
        true = true * kept
    error = (output - true).norm() / true.norm()
    # Not `error > limit`, which NaN would pass.
    if not error <= limit:
        raise WrongOutputError(
            f"its output is wrong: its relative distance from the plain loop's is {error:.2g}, and "
            f"rounding explains only {limit:g}"
        )
