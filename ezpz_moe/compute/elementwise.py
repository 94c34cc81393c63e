"""The elementwise part of SwiGLU and its backward, for every backend built from torch's products.

Every function writes into its arguments and allocates nothing of their size, because fresh memory
costs an allocator the most. It works on some rows at a time: on a CPU on as many as stay in the
cache, since each step would otherwise read and write all rows in memory.

Legend of the suffixes: :mod:`.contract`. G = rows that may belong to an expert.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_IN_CACHE = 2**17
"""Elements at once on a CPU: 512 KiB in float32, and enough for torch's threads to share them."""
_ON_A_DEVICE = 2**24
"""Elements at once elsewhere: a temporary tensor of 64 MiB, and few launches."""


def swiglu(
    gate_GF: Tensor, up_GF: Tensor, hidden_GF: Tensor, activated_GF: Tensor | None = None
) -> None:
    """Write ``silu(gate) * up`` into ``hidden``, and ``silu(gate)`` into ``activated`` if given."""
    activated_GF = hidden_GF if activated_GF is None else activated_GF
    for gate, up, activated, hidden in _slices(gate_GF, up_GF, activated_GF, hidden_GF):
        torch.ops.aten.silu.out(gate, out=activated)
        torch.mul(activated, up, out=hidden)


def swiglu_gradients_(
    grad_hidden_GF: Tensor, activated_GF: Tensor, gate_GF: Tensor, up_GF: Tensor
) -> None:
    """Replace ``grad_hidden`` by the gradient of gate, and ``activated`` by that of up.

    ``activated`` is ``silu(gate)``, and the gradient is that of ``activated * up``.
    """
    for grad_hidden, activated, gate, up in _slices(grad_hidden_GF, activated_GF, gate_GF, up_GF):
        _gradients_(grad_hidden, activated, gate, up)


def scaled_swiglu(
    gate_GF: Tensor,
    up_GF: Tensor,
    score_G: Tensor,
    scaled_GF: Tensor,
    activated_GF: Tensor | None = None,
) -> None:
    """Write ``score * silu(gate) * up`` into ``scaled``; ``activated`` as in :func:`swiglu`.

    Scores are not rounded to the rows' dtype: a product with them is computed in theirs.
    """
    activated_GF = scaled_GF if activated_GF is None else activated_GF
    for gate, up, score, activated, scaled in _slices(
        gate_GF, up_GF, score_G, activated_GF, scaled_GF
    ):
        torch.ops.aten.silu.out(gate, out=activated)
        torch.mul(activated, up, out=scaled)
        scaled.mul_(score.unsqueeze(1))


def scaled_swiglu_gradients_(
    grad_scaled_GF: Tensor,
    activated_GF: Tensor,
    gate_GF: Tensor,
    up_GF: Tensor,
    score_G: Tensor,
    grad_score_G: Tensor,
) -> None:
    """Do what :func:`swiglu_gradients_` does behind a score; write the scores' gradient too."""
    for grad_scaled, activated, gate, up, score, grad_score in _slices(
        grad_scaled_GF, activated_GF, gate_GF, up_GF, score_G, grad_score_G
    ):
        # In float32 where rows are in half of it, whatever the scores are in: the sum over F would
        # otherwise add up two more roundings.
        hidden = activated.to(torch.promote_types(activated.dtype, torch.float32), copy=True)
        grad_score.copy_(hidden.mul_(up).mul_(grad_scaled).sum(1))
        _gradients_(grad_scaled.mul_(score.unsqueeze(1)), activated, gate, up)


def _gradients_(grad_hidden: Tensor, activated: Tensor, gate: Tensor, up: Tensor) -> None:
    # The order matters: up's gradient needs that of hidden, which gate's then overwrites.
    activated.mul_(grad_hidden)
    grad_gate = grad_hidden.mul_(up)
    # The out variant of an aten operator, because torch.nn.functional has no silu backward that
    # writes in place.
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)


def _slices(*rows_GX: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return the rows of all tensors in slices of a size that suits their device."""
    first = rows_GX[0]
    elements = _IN_CACHE if first.device.type == "cpu" else _ON_A_DEVICE
    rows = max(1, elements // max(1, first.shape[1]))
    return zip(*(each.split(rows) for each in rows_GX), strict=True)
