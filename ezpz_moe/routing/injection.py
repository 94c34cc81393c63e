"""A loss that trains without being part of the trainer's loss."""

from __future__ import annotations

import torch
from torch import Tensor


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones((), dtype=ctx.loss_dtype)


def inject(carrier: Tensor, loss: Tensor) -> Tensor:
    """``carrier`` as it is; in backward, ``loss`` is differentiated along with whatever follows.

    The gradient is that of ``following loss + loss``, as often as the carrier's backward runs: once
    for each forward pass, recomputed or not. Source of the idea: Megatron-LM's
    ``MoEAuxLossAutoScaler``.

    Args:
        carrier: a tensor on the way to the trainer's loss, whose backward must run.
        loss: scalar.
    """
    return _Inject.apply(carrier, loss)
