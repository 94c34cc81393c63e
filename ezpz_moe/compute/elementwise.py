"""The elementwise part of a SwiGLU's backward, as every backend with kernels of torch's has it."""

import torch
from torch import Tensor


def swiglu_gradients_(
    grad_hidden: Tensor, activated: Tensor, gate: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up in ``activated * up``, where ``activated = silu(gate)``.

    Nothing is allocated, because fresh memory is what an allocator charges for: the gradient of
    gate takes the place of ``grad_hidden``, that of up the place of ``activated``.
    """
    grad_up = activated.mul_(grad_hidden)
    grad_gate = grad_hidden.mul_(up)
    torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
    return grad_gate, grad_up
