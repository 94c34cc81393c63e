"""The elementwise part of an expert FFN and its backward, for every backend of torch's products.

Every function writes into its arguments and allocates nothing of their size, because fresh memory
costs an allocator the most. It works on some rows at a time: on a CPU on as many as stay in the
cache, since each step would otherwise read and write all rows in memory.

Legend of the suffixes: :mod:`.contract`. G = rows that may belong to an expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.activations import Activation

_IN_CACHE = 2**17
"""Elements at once on a CPU: 512 KiB in float32, and enough for torch's threads to share them."""
_ON_A_DEVICE = 2**24
"""Elements at once elsewhere: a temporary tensor of 64 MiB, and few launches."""


def hidden_rows(
    activation: Activation,
    gate_GF: Tensor,
    up_GF: Tensor,
    hidden_GF: Tensor,
    activated_GF: Tensor | None = None,
    score_G: Tensor | None = None,
) -> None:
    """Write ``score * act(gate) * factor(up)`` into ``hidden``.

    Args:
        up_GF: [G, 0] if the activation has no gate.
        activated_GF: gets ``act(gate)``, if given.
        score_G: one by default. Scores are not rounded to the rows' dtype: a product with them is
            computed in theirs.
    """
    for gate, up, hidden, activated, score in _slices(
        gate_GF, up_GF, hidden_GF, activated_GF, score_G
    ):
        activated = hidden if activated is None else activated
        activation.apply(gate, activated)
        if activation.is_gated:
            torch.mul(activated, _factor(activation, up), out=hidden)
        if score is not None:
            hidden.mul_(score.unsqueeze(1))


def hidden_gradients_(
    activation: Activation,
    grad_hidden_GF: Tensor,
    activated_GF: Tensor | None,
    gate_GF: Tensor,
    up_GF: Tensor,
    score_G: Tensor | None = None,
    grad_score_G: Tensor | None = None,
) -> None:
    """Replace ``grad_hidden`` by the gradient of gate, and ``activated`` by that of up.

    The gradient is that of :func:`hidden_rows`, which has written ``activated``. Without a gate
    there is none. With a score, its gradient is written too.
    """
    for grad_hidden, activated, gate, up, score, grad_score in _slices(
        grad_hidden_GF, activated_GF, gate_GF, up_GF, score_G, grad_score_G
    ):
        if score is not None:
            hidden = _hidden(activation, activated, gate, up)
            grad_score.copy_(hidden.mul_(grad_hidden).sum(1))
            grad_hidden.mul_(score.unsqueeze(1))
        # The order matters: up's gradient needs that of hidden, which gate's then overwrites.
        if activation.is_gated:
            activated.mul_(grad_hidden)
            if activation.differentiate_factor_ is not None:
                activation.differentiate_factor_(activated, up)
            grad_hidden.mul_(_factor(activation, up))
        activation.differentiate_(grad_hidden, gate)


def _factor(activation: Activation, up: Tensor) -> Tensor:
    return up if activation.factor is None else activation.factor(up)


def _hidden(activation: Activation, activated: Tensor | None, gate: Tensor, up: Tensor) -> Tensor:
    """Return new hidden rows, without a score."""
    # In float32 where rows are in half of it, whatever the scores are in: the sum over F would
    # otherwise add up two more roundings.
    wider = torch.promote_types(gate.dtype, torch.float32)
    if activated is None:
        hidden = gate.to(wider, copy=True)
        activation.apply(hidden, hidden)
        return hidden
    return activated.to(wider, copy=True).mul_(_factor(activation, up))


def _slices(first_GX: Tensor, *others_GX: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Return the rows of all tensors in slices of a size that suits their device; None for None."""
    elements = _IN_CACHE if first_GX.device.type == "cpu" else _ON_A_DEVICE
    rows = max(1, elements // max(1, first_GX.shape[1]))
    slices = first_GX.split(rows)
    nothing = [None] * len(slices)
    others = (nothing if each is None else each.split(rows) for each in others_GX)
    return zip(slices, *others, strict=True)
