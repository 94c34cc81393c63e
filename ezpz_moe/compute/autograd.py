"""From four plain kernels to two differentiable torch operators.

A kernel is a function from tensors to new tensors: it knows nothing of autograd, reads the token
counts on the host where it wants to, and writes its results into buffers of its own. Registered
as a custom operator it is *one opaque node*: ``torch.compile(fullgraph=True)`` does not look at
the counts inside, activation checkpointing recomputes it as a whole, and a second
differentiation is refused by torch with the operator's name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor

from ezpz_moe.compute.contract import Backend


@dataclass(frozen=True)
class Kernels:
    """The four kernels of a backend. Legend of the suffixes: :mod:`.contract`.

    Every returned tensor is new, with the shape and strides of ``torch.empty_like`` of what it
    is the gradient of (``B_EKN`` may be a transposed view: its gradient is laid out like it).

    Attributes:
        mm: ``(A_RK, B_EKN, offs_E) -> C_RN``.
        mm_backward: ``(grad_C_RN, A_RK, B_EKN, offs_E) -> (grad_A_RK, grad_B_EKN)``.
        swiglu: ``(w1, w2, w3, x, counts) -> (y_RD, gate_RF, up_RF)``; gate and up are
            ``x @ w1.T`` and ``x @ w3.T``, all that backward needs saved beside the inputs.
        swiglu_backward: ``(grad_y_RD, w1, w2, w3, x, counts, gate_RF, up_RF)
            -> (grad_w1, grad_w2, grad_w3, grad_x)``.
    """

    mm: Callable[[Tensor, Tensor, Tensor], Tensor]
    mm_backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    swiglu: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    swiglu_backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        tuple[Tensor, Tensor, Tensor, Tensor],
    ]


class KernelBackend(Backend):
    """A backend made of :class:`Kernels`. Saved for backward: the inputs and two [R, F]."""

    def __init__(self, kernels: Kernels) -> None:
        self._mm_op = _differentiable_mm(self.name, kernels)
        self._swiglu_op = _differentiable_swiglu(self.name, kernels)

    def _grouped_mm(self, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
        return self._mm_op(A_RK, B_EKN, offs_E)

    def _swiglu(
        self,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor,
        x_RD: Tensor,
        num_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        y_RD, _, _ = self._swiglu_op(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)
        return y_RD


def _operator(name: str, kernel: Callable) -> torch.library.CustomOpDef:
    @wraps(kernel)
    def in_the_given_dtype(*tensors: Tensor):
        # Autocast reaches into an operator and would cast some of its products, but not others.
        with torch.autocast(tensors[0].device.type, enabled=False):
            return kernel(*tensors)

    return torch.library.custom_op(f"ezpz_moe::{name}", in_the_given_dtype, mutates_args=())


def _differentiable_mm(name: str, kernels: Kernels) -> Callable[..., Tensor]:
    forward = _operator(f"{name}_mm", kernels.mm)
    backward = _operator(f"{name}_mm_backward", kernels.mm_backward)

    @forward.register_fake
    def _(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
        return A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2])

    @backward.register_fake
    def _(grad_C_RN, A_RK, B_EKN, offs_E):
        return torch.empty_like(A_RK), torch.empty_like(B_EKN)

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def differentiate(ctx, grad_C_RN):
        return *backward(grad_C_RN, *ctx.saved_tensors), None

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def _differentiable_swiglu(name: str, kernels: Kernels) -> Callable[..., tuple[Tensor, ...]]:
    forward = _operator(f"{name}_swiglu", kernels.swiglu)
    backward = _operator(f"{name}_swiglu_backward", kernels.swiglu_backward)

    @forward.register_fake
    def _(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E):
        R, F = x_RD.shape[0], w1_EFD.shape[1]
        return x_RD.new_empty(R, x_RD.shape[1]), x_RD.new_empty(R, F), x_RD.new_empty(R, F)

    @backward.register_fake
    def _(grad_y_RD, w1_EFD, w2_EDF, w3_EFD, x_RD, counts_E, gate_RF, up_RF):
        return tuple(torch.empty_like(like) for like in (w1_EFD, w2_EDF, w3_EFD, x_RD))

    def setup_context(ctx, inputs, output):
        _, gate_RF, up_RF = output
        # gate and up are outputs only so that they can be saved: nobody differentiates them, and
        # without this autograd would fill two [R, F] tensors of zeros for every backward.
        ctx.mark_non_differentiable(gate_RF, up_RF)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, gate_RF, up_RF)

    def differentiate(ctx, grad_y_RD, grad_gate_RF, grad_up_RF):
        if grad_y_RD is None:  # nothing arrived from above
            return (None,) * 5
        return *backward(grad_y_RD, *ctx.saved_tensors), None

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward
