"""The elementwise part of SwiGLU's backward, for every backend that uses torch's kernels."""

import torch
from torch import Tensor


def swiglu_gradients_(
    grad_hidden: Tensor, activated: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of gate and up in ``activated * up``, with ``activated = silu(gate)``.

    Allocates nothing, because fresh memory costs an allocator the most: the gradient of gate
    replaces ``grad_hidden``, and that of up replaces ``activated``.
    """
    # The order matters: grad_up needs grad_hidden, which grad_gate then overwrites.
    grad_up = activated.mul_(grad_hidden)
    grad_gate = grad_hidden.mul_(up)
    # The out variant of an aten operator, because torch.nn.functional has no silu backward that
    # writes in place.
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grad_gate, grad_up
