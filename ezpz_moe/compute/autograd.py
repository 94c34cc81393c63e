"""Turn four plain kernels into differentiable torch operators.

A kernel is a function from tensors to new tensors: it knows nothing of autograd, may read the token
counts on the host, and writes its results into its own buffers. Registered as a custom operator,
it is *one opaque node*: ``torch.compile(fullgraph=True)`` does not look at the counts inside,
activation checkpointing recomputes it as a whole, and torch refuses a second differentiation with
an error that names the operator.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from ezpz_moe.compute.contract import Backend


@dataclass(frozen=True)
class Kernels:
    """The four kernels of a backend. Legend of the suffixes: :mod:`.contract`.

    Every returned tensor is new, with the shape and strides of ``torch.empty_like`` of the tensor
    that it is the gradient of (``B_EKN`` may be a transposed view: its gradient has the same
    layout). After its tensors, each kernel takes the backend's ``kernel_options``: numbers,
    annotated as such.

    Attributes:
        mm: ``(A_RK, B_EKN, offs_E) -> C_RN``.
        mm_backward: ``(grad_C_RN, A_RK, B_EKN, offs_E) -> (grad_A_RK, grad_B_EKN)``.
        swiglu: ``(w1, w2, w3, x, counts) -> (y_RD, gate_RF, up_RF)``; gate and up are
            ``x @ w1.T`` and ``x @ w3.T``, which is all that backward needs besides the inputs.
            Their rows of the tail may hold anything, and backward must not read them: ``auto`` may
            take another backend's backward.
        swiglu_backward: ``(grad_y_RD, w1, w2, w3, x, counts, gate_RF, up_RF)
            -> (grad_w1, grad_w2, grad_w3, grad_x)``. If ``gate_RF`` and ``up_RF`` are None, they
            were not saved, and the kernel computes them again.
    """

    mm: Callable[..., Tensor]
    mm_backward: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., tuple[Tensor, Tensor, Tensor]]
    swiglu_backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class Operators:
    """The kernels of the backend ``name`` as torch operators, ``torch.ops.ezpz_moe.<name>_*``.

    Attributes:
        mm: the grouped product, differentiable.
        swiglu: the expert FFN, differentiable; saves gate and up.
        swiglu_output: the same without gate and up, which backward computes again.
    """

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.mm = _differentiable_mm(name, kernels)
        backward = _swiglu_backward(name, kernels)
        self.swiglu = _swiglu_that_saves(name, kernels, backward)
        self.swiglu_output = _swiglu_that_recomputes(name, kernels, backward)


@dataclass(frozen=True)
class KernelBackend(Backend):
    """A backend made of :class:`Kernels`. Saves the inputs and two [R, F] for backward.

    Attributes:
        recompute: save only the inputs; backward then computes gate and up again, two products of
            eleven in forward and backward together.
    """

    operators: ClassVar[Operators]

    recompute: bool = False

    @property
    def kernel_options(self) -> tuple[Any, ...]:
        """What the kernels take after their tensors."""
        return ()

    def compute(self, kernel: str, *tensors: Tensor | None) -> Any:
        """Run one of the four kernels, by its name in :class:`Kernels`, outside of autograd."""
        return getattr(self.operators.kernels, kernel)(*tensors, *self.kernel_options)

    def _grouped_mm(self, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
        return self.operators.mm(A_RK, B_EKN, offs_E, *self.kernel_options)

    def _swiglu(
        self,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor,
        x_RD: Tensor,
        num_tokens_per_expert_E: Tensor,
    ) -> Tensor:
        inputs = (w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E, *self.kernel_options)
        if self.recompute:
            return self.operators.swiglu_output(*inputs)
        y_RD, _, _ = self.operators.swiglu(*inputs)
        return y_RD


def _operator(name: str, kernel: Callable[..., Any]) -> torch.library.CustomOpDef:
    @wraps(kernel)
    def in_the_given_dtype(*arguments: Any) -> Any:
        # Autocast reaches into an operator, and would cast some of its products but not others.
        with torch.autocast(arguments[0].device.type, enabled=False):
            return kernel(*arguments)

    # mutates_args=() is a promise that torch relies on: it may drop or repeat a call, and a kernel
    # that wrote into its inputs would corrupt them.
    return torch.library.custom_op(f"ezpz_moe::{name}", in_the_given_dtype, mutates_args=())


def _differentiable_mm(name: str, kernels: Kernels) -> Callable[..., Tensor]:
    forward = _operator(f"{name}_mm", kernels.mm)
    # Backward is an operator too, not plain Python: torch.compile traces backward as well, and
    # would otherwise look at the counts inside. It has no gradient itself, so a second
    # differentiation raises.
    backward = _operator(f"{name}_mm_backward", kernels.mm_backward)

    @forward.register_fake
    def _(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, *options: Any) -> Tensor:
        # Shapes only: torch.compile traces with this instead of running the kernel.
        return A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2])

    @backward.register_fake
    def _(
        grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        # Strides count as much as shapes: compiled code reads the real gradient with the strides of
        # this one.
        return torch.empty_like(A_RK), torch.empty_like(B_EKN)

    # Options stay out of save_for_backward, which takes tensors only.
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.options = inputs[3:]

    def differentiate(ctx: Any, grad_C_RN: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(grad_C_RN, *ctx.saved_tensors, *ctx.options)
        # None for the offsets and the options: torch wants one entry for each input.
        return *gradients, None, *(None for _ in ctx.options)

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def _swiglu_backward(name: str, kernels: Kernels) -> Callable[..., tuple[Tensor, ...]]:
    # One backward serves both forwards: it recomputes gate and up when it gets None for them.
    backward = _operator(f"{name}_swiglu_backward", kernels.swiglu_backward)

    @backward.register_fake
    def _(grad_y_RD: Tensor, *others: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(like) for like in others[:4])  # the weights and x

    return backward


def _swiglu_that_saves(
    name: str, kernels: Kernels, backward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Tensor, ...]]:
    forward = _operator(f"{name}_swiglu", kernels.swiglu)

    @forward.register_fake
    def _(
        w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, *others: Any
    ) -> tuple[Tensor, ...]:
        R, F = x_RD.shape[0], w1_EFD.shape[1]
        return x_RD.new_empty(x_RD.shape), x_RD.new_empty(R, F), x_RD.new_empty(R, F)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, gate_RF, up_RF = output
        # gate and up are outputs only in order to be saved. Nobody differentiates them; unless
        # torch knows that, autograd fills two [R, F] tensors with zeros in every backward.
        ctx.mark_non_differentiable(gate_RF, up_RF)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:5], gate_RF, up_RF)
        ctx.options = inputs[5:]

    def differentiate(
        ctx: Any, grad_y_RD: Tensor | None, grad_gate_RF: None, grad_up_RF: None
    ) -> tuple[Tensor | None, ...]:
        without_gradient = (None, *(None for _ in ctx.options))
        if grad_y_RD is None:  # no gradient arrived from above
            return (None,) * 4 + without_gradient
        return *backward(grad_y_RD, *ctx.saved_tensors, *ctx.options), *without_gradient

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def _swiglu_that_recomputes(
    name: str, kernels: Kernels, backward: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., Tensor]:
    @wraps(kernels.swiglu)
    def output(*arguments: Any) -> Tensor:
        y_RD, _, _ = kernels.swiglu(*arguments)
        return y_RD

    # torch reads the operator's schema from it: the kernel's arguments, and y as the only result.
    signature = inspect.signature(kernels.swiglu).replace(return_annotation=Tensor)
    output.__signature__ = signature  # type: ignore[attr-defined]
    forward = _operator(f"{name}_swiglu_output", output)

    @forward.register_fake
    def _(w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, *others: Any) -> Tensor:
        return x_RD.new_empty(x_RD.shape)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    def differentiate(ctx: Any, grad_y_RD: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(grad_y_RD, *ctx.saved_tensors, None, None, *ctx.options)
        # The two None in the call stand for gate and up.
        return *gradients, None, *(None for _ in ctx.options)

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward
