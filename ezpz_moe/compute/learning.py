"""Gradients for the parameters of some experts alone: of the others nothing is computed.

``trained_E`` is a bool tensor [E] in host memory with an entry for each expert of the rank, or
None: all learn. The rows of those that learn are gathered, and the gradient of a weight stack is a
product of these rows: zeros for all others. Empty, [0], it says that no expert learns: then no
gradient of a parameter exists at all.

Legend of the suffixes: :mod:`.contract`. r = rows of the experts that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ezpz_moe.compute.grouping import Grouping


def no_expert() -> Tensor:
    """Return the ``trained_E`` that says that no expert learns."""
    return torch.empty(0, dtype=torch.bool)


def has_gradients(trained_E: Tensor | None) -> bool:
    """Return whether a parameter has a gradient."""
    return trained_E is None or trained_E.numel() > 0


class Learning(NamedTuple):
    """The rows of the experts that learn; ``groups`` gives a frozen expert none."""

    groups: Grouping
    rows_r: Tensor

    def weight_gradient(self, left_RX: Tensor, right_RX: Tensor, like_EMN: Tensor) -> Tensor:
        """Compute :meth:`.Grouping.weight_gradient`, with zeros for frozen experts."""
        left, right = (
            self.groups.operand(rows_RX.index_select(0, self.rows_r))
            for rows_RX in (left_RX, right_RX)
        )
        return self.groups.weight_gradient(left, right, like_EMN)


def learning(
    grouping: type[Grouping],
    trained_E: Tensor,
    counts_E: Tensor,
    rows_RX: Tensor,
    options: tuple[Any, ...],
) -> Learning:
    """Find the rows of the experts that learn. Device syncs: those of ``grouping.of_counts``."""
    counts_trained_E = counts_E * trained_E.to(counts_E.device, non_blocking=True)
    rows_r = _trained_first(trained_E, counts_E, rows_RX)
    # Elsewhere the number of these rows is not known without waiting for the device: the others
    # are a tail. Where capacities follow from the number of rows, it may not change.
    if rows_RX.is_cpu and not grouping.depends_on_number_of_rows:
        rows_r = rows_r[: int(counts_trained_E.sum())]
    groups = grouping.of_counts(counts_trained_E, rows_RX[: len(rows_r)], *options)
    return Learning(groups, rows_r)


def _trained_first(trained_E: Tensor, counts_E: Tensor, rows_RX: Tensor) -> Tensor:
    """Return all rows, those of experts that learn first, in their order."""
    device = rows_RX.device
    ends_E = torch.cumsum(counts_E.to(device, non_blocking=True), 0)
    row_R = torch.arange(rows_RX.shape[0], device=device)
    # right=True skips experts without rows; a row of the tail is one of the expert after the last.
    expert_R = torch.searchsorted(ends_E, row_R, right=True)
    learns_E = torch.cat([trained_E, trained_E.new_zeros(1)]).to(device, non_blocking=True)
    return torch.argsort(~learns_E[expert_R], stable=True)


def of_trained(
    parameters_EX: Sequence[Tensor | None], trained_E: Tensor | None
) -> list[Tensor | None]:
    """Return the same parameters; a frozen expert's part of a gradient becomes zero.

    For products that torch differentiates, which are those of all experts.
    """
    if trained_E is None:
        return list(parameters_EX)
    return [None if each is None else _OfTrained.apply(each, trained_E) for each in parameters_EX]


class _OfTrained(torch.autograd.Function):
    """The identity, of whose gradient frozen experts get zeros. Backward is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, parameter_EX: Tensor, trained_E: Tensor) -> Tensor:
        ctx.save_for_backward(trained_E)
        return parameter_EX.view_as(parameter_EX)

    @staticmethod
    def backward(ctx: Any, grad_EX: Tensor) -> tuple[Tensor, None]:
        (trained_E,) = ctx.saved_tensors
        frozen_E = ~trained_E.to(grad_EX.device, non_blocking=True)
        # A fill, not a product: NaN * 0 is NaN.
        return grad_EX.masked_fill(frozen_E.view(-1, *(1,) * (grad_EX.dim() - 1)), 0), None
