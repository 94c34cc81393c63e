"""A loss that trains the model without being part of the trainer's loss."""

from __future__ import annotations

import torch
from torch import Tensor


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.of_loss = {"dtype": loss.dtype, "device": loss.device}
        # A view, because autograd treats an input that is returned unchanged specially.
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), **ctx.of_loss)


def inject(carrier: Tensor, loss: Tensor) -> Tensor:
    """``carrier`` unchanged; in backward, ``loss`` is differentiated along with whatever follows.

    The gradient is that of ``following loss + loss``, once per backward of the carrier: that is,
    once per forward pass, recomputed or not. Source of the idea: Megatron-LM's
    ``MoEAuxLossAutoScaler``.

    Args:
        carrier: a tensor on the way to the trainer's loss; its backward must run.
        loss: scalar.
    """
    return _Inject.apply(carrier, loss)
