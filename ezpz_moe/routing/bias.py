"""Balancing without a loss: a bias on the scores by which experts are chosen.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bias_change(counts_E: Tensor, *, rate: float, by_sign: bool) -> Tensor:
    """The change of the experts' biases after a step, float32; it sums to zero.

    ``by_sign`` moves every bias by the same rate, as the host does. Otherwise the violation itself,
    relative to the mean load, decides how far, which lets the bias come to rest. Both are variants
    of Loss-Free Balancing, arXiv 2408.15664, algorithm 1 and section 4.3.

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
        step_E = error_E / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    # Moving all biases alike would change no choice, but would let them drift.
    return rate * (step_E - step_E.mean())
