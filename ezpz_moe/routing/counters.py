"""Counters of a router, which activation checkpointing and gradient accumulation do not double.

Recomputation runs a router a second time, inside the backward pass. There the counters stand
still: the operator below looks whether the autograd engine is running.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUMS = (
    "tokens",
    "top1_probability",
    "margin",
    "aux_loss",
    "mse_loss",
    "z_loss",
    "longest",
    "not_finite",
)
"""What ``sums_S`` adds up: the first three over tokens, the losses over groups, times the groups'
weight; the most rows that a routed expert computes of a microbatch; and tokens with a logit that
is not finite."""


@torch.library.custom_op("ezpz_moe::count", mutates_args=("counts_E", "sums_S"))
def count(counts_E: Tensor, sums_S: Tensor, new_E: Tensor, new_S: Tensor) -> None:
    """Add ``new_E`` to ``counts_E`` and ``new_S`` to ``sums_S``, unless this is a recomputation.

    Args:
        counts_E: int64 assignments to each expert so far.
        sums_S: float32, one for each of ``SUMS``.
        new_E: those of this microbatch, any dtype.
        new_S: those of this microbatch.
    """
    if not is_recomputation():
        counts_E.add_(new_E.to(counts_E.dtype))
        sums_S.add_(new_S.to(sums_S.dtype))


def is_recomputation() -> bool:
    """Whether the autograd engine is running in this thread: a forward pass then is a second one.

    torch.utils.checkpoint tells a recomputation by the same number.
    """
    return torch._C._current_graph_task_id() != -1
