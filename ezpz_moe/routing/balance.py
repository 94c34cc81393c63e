"""How training balances the load: a bias after each step, a loss in backward, schedules.

The losses themselves are in :mod:`.losses`.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.config.schedule_schema import Schedule


def bias_change(counts_E: Tensor, *, rate: float, by_sign: bool) -> Tensor:
    """Return the change of the experts' biases after a step, float32; it sums to zero.

    ``by_sign`` moves every bias by the same rate, as the host does. Otherwise the step is
    proportional to the violation, relative to the mean load, which lets the bias come to rest. Both
    are variants of Loss-Free Balancing, arXiv 2408.15664, algorithm 1 and section 4.3.

    Args:
        counts_E: assignments of the step to each expert, over all ranks.
        rate: per step.
        by_sign: whether only the direction counts.
    """
    counts_E = counts_E.float()
    mean = counts_E.mean()
    error_E = mean - counts_E
    if by_sign:
        step_E = torch.sign(error_E)
    else:
        # A step without tokens has mean 0: its error is 0 too, and the bias stays.
        step_E = error_E / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    # In the host's order, so that its bits are the host's. Moving all biases alike would change no
    # choice, but would let them drift.
    step_E = rate * step_E
    return step_E - step_E.mean()


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.of_loss = {"dtype": loss.dtype, "device": loss.device}
        # A view, because autograd treats an input that is returned unchanged specially.
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # 1 whatever arrives for the carrier: the loss is a separate term of the total, and must
        # not be scaled by the model's gradient.
        return grad, torch.ones((), **ctx.of_loss)


def inject(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return ``carrier`` unchanged; its backward also differentiates ``loss``.

    The gradient is that of ``following loss + loss``, once per backward of the carrier: that is,
    once per forward pass, recomputed or not. Source of the idea: Megatron-LM's
    ``MoEAuxLossAutoScaler``.

    Args:
        carrier: a tensor on the way to the trainer's loss; its backward must run.
        loss: scalar.
    """
    return _Inject.apply(carrier, loss)


def first_value(schedule: Schedule, device: torch.device) -> Tensor | float:
    """Return the value in step 1: a float32 tensor if it moves, to be filled in later steps."""
    if schedule.is_constant:
        return schedule.end
    # A tensor, because torch.compile would build a float into the code, and compile again when it
    # changes. With its dtype, because a trainer builds its model in another default.
    return torch.tensor(value_at(schedule, 1), dtype=torch.float32, device=device)


def value_at(schedule: Schedule, step: int) -> float:
    """Return the schedule's value in training step ``step``, counted from 1.

    >>> value_at(Schedule(start=2.0, end=1.0, steps=5), 3)
    1.5
    >>> value_at(Schedule(start=4.0, end=1.0, steps=5, shape="exponential"), 3)
    2.0
    """
    start, end = schedule.start, schedule.end
    progress = 1.0 if schedule.steps == 1 else min(1.0, max(0, step - 1) / (schedule.steps - 1))
    # Return `end` itself: start + (end - start) can miss it by a rounding.
    if progress == 1.0 or schedule.is_constant:
        return end
    match schedule.shape:
        case "linear":
            return start + (end - start) * progress
        case "exponential":
            # Linear in the logarithm.
            return start ** (1 - progress) * end**progress
        case "cosine":
            return start + (end - start) * (1 - math.cos(math.pi * progress)) / 2
