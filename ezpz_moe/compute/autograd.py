"""Turn plain kernels into differentiable torch operators.

A kernel is a function from tensors to new tensors: it knows nothing of autograd, may read the token
counts on the host, and writes its results into its own buffers. Registered as a custom operator,
it is *one opaque node*: ``torch.compile(fullgraph=True)`` does not look at the counts inside,
activation checkpointing saves or recomputes it as a whole, and torch refuses a second
differentiation with an error that names the operator. What forward keeps for backward is among the
operator's outputs, because a list of what checkpointing saves knows operators and nothing else.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from ezpz_moe.compute.arguments import NO_BIASES, Biases
from ezpz_moe.compute.contract import Backend
from ezpz_moe.compute.learning import has_gradients, no_expert


@dataclass(frozen=True)
class Kernels:
    """The kernels of a backend. Legend of the suffixes: :mod:`.contract`.

    Every returned tensor is new, with the shape and strides of ``torch.empty_like`` of the tensor
    that it is the gradient of (``B_EKN`` may be a transposed view: its gradient has the same
    layout). After its own arguments, each kernel takes the backend's ``kernel_options``: numbers,
    annotated as such.

    Attributes:
        mm: ``(A_RK, B_EKN, offs_E) -> C_RN``.
        mm_backward: ``(grad_C_RN, A_RK, B_EKN, offs_E) -> (grad_A_RK, grad_B_EKN)``.
        ffn: ``(*parameters, x, counts, trained, activation) -> (y_RD, gate_RF, up_RF)``. The
            parameters are w1, w2, w3, b1, b2, b3: w3 and b3 are None without a gate, all three b
            without biases. Gate and up are ``x @ w1.T + b1`` and ``x @ w3.T + b3``, which is all
            that backward needs besides the inputs; without a gate up is [R, 0]. Their rows of the
            tail may hold anything, and backward must not read them: ``auto`` may take another
            backend's backward.
        ffn_backward: ``(grad_y_RD, *parameters, x, counts, trained, gate_RF, up_RF, activation)``
            to a list of the gradients of all parameters that are not None, and of x. If ``gate_RF``
            and ``up_RF`` are None, they were not saved, and the kernel computes them again. Of
            experts that ``trained`` leaves out the gradients are zeros (:mod:`.learning`).
        routed: ``(*parameters, x_TD, scores_TK, ids_TK, counts, trained, num_rows, dtype,
            activation) -> (out_TD, gate_RF, up_RF, order_R)``, with the order of
            :func:`.dispatch.row_order`. Rows are computed in that dtype. Parameters in another are
            cast where a product reads them, in forward and again in backward: no copy of all of
            them is kept.
        routed_backward: ``(grad_out_TD, *parameters, x, scores, counts, trained, gate_RF, up_RF,
            order_R, dtype, activation)`` to a list as above, with the scores' gradient last.
    """

    mm: Callable[..., Tensor]
    mm_backward: Callable[..., tuple[Tensor, Tensor]]
    ffn: Callable[..., tuple[Tensor, Tensor, Tensor]]
    ffn_backward: Callable[..., list[Tensor]]
    routed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    routed_backward: Callable[..., list[Tensor]]


class Operators:
    """The kernels of the backend ``name`` as torch operators, ``torch.ops.ezpz_moe.<name>_*``.

    Attributes:
        mm: the grouped product, differentiable.
        ffn: the expert FFN, differentiable; returns gate and up too, which it saves.
        ffn_output: the same without gate and up, which backward computes again.
        routed: the routed layer, differentiable; returns gate, up and the order too.
        routed_output: the same without gate and up.
    """

    def __init__(self, name: str, kernels: Kernels) -> None:
        self.kernels = kernels
        self.mm = _differentiable_mm(name, kernels)
        self.ffn, self.ffn_output = _layer(f"{name}_ffn", kernels.ffn, kernels.ffn_backward, _FFN)
        self.routed, self.routed_output = _layer(
            f"{name}_routed",
            kernels.routed,
            kernels.routed_backward,
            _ROUTED,
        )


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

    def compute(self, kernel: str, *arguments: Tensor | int | None) -> Any:
        """Run a kernel, by its name in :class:`Kernels`, outside of autograd."""
        return getattr(self.operators.kernels, kernel)(*arguments, *self.kernel_options)

    def _grouped_mm(self, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
        return self.operators.mm(A_RK, B_EKN, offs_E, *self.kernel_options)

    def _ffn(
        self,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor | None,
        x_RD: Tensor,
        num_tokens_per_expert_E: Tensor,
        activation: str,
        biases: Biases | None,
        trained_E: Tensor | None = None,
    ) -> Tensor:
        parameters = (w1_EFD, w2_EDF, w3_EFD, *(biases or NO_BIASES))
        rows = (x_RD, num_tokens_per_expert_E, trained_E)
        inputs = (*parameters, *rows, activation, *self.kernel_options)
        if self.recompute:
            return self.operators.ffn_output(*inputs)
        y_RD, _, _ = self.operators.ffn(*inputs)
        return y_RD

    def _routed(
        self,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor | None,
        x_TD: Tensor,
        scores_TK: Tensor,
        ids_TK: Tensor,
        num_tokens_per_expert_E: Tensor,
        num_rows: int,
        dtype: torch.dtype,
        activation: str,
        biases: Biases | None,
        trained_E: Tensor | None = None,
    ) -> Tensor:
        node = self.operators.routed_output if self.recompute else self.operators.routed
        out_TD, *_ = node(
            *(w1_EFD, w2_EDF, w3_EFD, *(biases or NO_BIASES), x_TD, scores_TK, ids_TK),
            *(num_tokens_per_expert_E, trained_E, num_rows, dtype),
            *(activation, *self.kernel_options),
        )
        return out_TD


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


@dataclass(frozen=True)
class _Arguments:
    """Where the arguments of a layer's forward are, and what its operator returns.

    Attributes:
        differentiable: so many inputs have gradients: the parameters and what follows them.
        kept: the inputs that backward needs, by their places. What follows the differentiable ones
            are the counts, and the experts that learn.
        first_option: where what backward takes last begins: all that are no tensors.
        fake: from the inputs to empty outputs: shapes only, for torch.compile, which traces with
            this instead of running the kernel. The first is the layer's output, gate and up follow.
        without_gate_and_up: the type of what is left without these two.
    """

    differentiable: int
    kept: tuple[int, ...]
    first_option: int
    fake: Callable[..., tuple[Tensor, ...]]
    without_gate_and_up: Any


_PARAMETERS = 6
"""w1, w2, w3, b1, b2, b3: the first arguments."""


def _fake_gate_and_up(
    parameters: tuple[Tensor | None, ...], num_rows: int, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    w1_EFD, _, w3_EFD, *_ = parameters
    assert w1_EFD is not None
    F = w1_EFD.shape[1]
    sizes = ((num_rows, F), (num_rows, 0 if w3_EFD is None else F))
    gate_RF, up_RF = (like.new_empty(size, dtype=dtype) for size in sizes)
    return gate_RF, up_RF


def _fake_ffn(*inputs: Any) -> tuple[Tensor, ...]:
    x_RD = inputs[_PARAMETERS]
    gate_and_up = _fake_gate_and_up(inputs[:_PARAMETERS], x_RD.shape[0], x_RD, x_RD.dtype)
    return x_RD.new_empty(x_RD.shape), *gate_and_up


def _fake_routed(*inputs: Any) -> tuple[Tensor, ...]:
    x_TD, _, ids_TK, _, _, num_rows, dtype, *_ = inputs[_PARAMETERS:]
    gate_and_up = _fake_gate_and_up(inputs[:_PARAMETERS], num_rows, x_TD, dtype)
    order_R = ids_TK.new_empty(num_rows, dtype=torch.int64)
    return x_TD.new_empty(x_TD.shape), *gate_and_up, order_R


_FFN = _Arguments(7, (*range(_PARAMETERS), 6, 7, 8), 9, _fake_ffn, Tensor)
# The order replaces the ids.
_ROUTED = _Arguments(8, (*range(_PARAMETERS), 6, 7, 9, 10), 12, _fake_routed, tuple[Tensor, Tensor])


def _layer(
    name: str,
    kernel: Callable[..., tuple[Tensor, ...]],
    backward_kernel: Callable[..., list[Tensor]],
    arguments: _Arguments,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the operator that saves gate and up, and the one that computes them again."""
    # One backward serves both forwards: it computes gate and up again if it gets None for them. It
    # is an operator for the reason given above.
    backward = _operator(f"{name}_backward", backward_kernel)

    @backward.register_fake
    def _(grad_out: Tensor, *others: Any) -> list[Tensor]:
        inputs, trained_E = others[: arguments.differentiable], others[arguments.differentiable + 1]
        wanted = inputs if has_gradients(trained_E) else inputs[_PARAMETERS:]
        return [torch.empty_like(like) for like in wanted if like is not None]

    saving = _operator(name, kernel)
    saving.register_fake(arguments.fake)
    _differentiate(saving, backward, arguments, not_saved=())

    annotation = arguments.without_gate_and_up
    output = _operator(f"{name}_output", _without_gate_and_up(kernel, annotation))
    output.register_fake(_without_gate_and_up(arguments.fake, annotation))
    _differentiate(output, backward, arguments, not_saved=(None, None))
    return saving, output


def _without_gate_and_up(
    kernel: Callable[..., tuple[Tensor, ...]], annotation: Any
) -> Callable[..., Any]:
    @wraps(kernel)
    def output(*inputs: Any) -> Any:
        out, _, _, *others = kernel(*inputs)
        return (out, *others) if others else out

    # torch reads the operator's schema from it: the kernel's arguments, and fewer results.
    signature = inspect.signature(kernel).replace(return_annotation=annotation)
    output.__signature__ = signature  # type: ignore[attr-defined]
    return output


def _differentiate(
    forward: torch.library.CustomOpDef,
    backward: Callable[..., list[Tensor]],
    arguments: _Arguments,
    not_saved: tuple[None, ...],
) -> None:
    """Give ``forward`` its gradient. ``not_saved`` stands for gate and up in backward's call."""

    # Options stay out of save_for_backward, which takes tensors only.
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        saved = output[1:] if isinstance(output, tuple) else ()
        # They are outputs only in order to be saved. Nobody differentiates them; unless torch knows
        # that, autograd fills as many tensors with zeros in every backward.
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[place] for place in arguments.kept), *saved)
        ctx.options = inputs[arguments.first_option :]

    def differentiate(
        ctx: Any, grad_out: Tensor | None, *of_saved: None
    ) -> tuple[Tensor | None, ...]:
        # torch wants one entry for each input.
        others = arguments.first_option - arguments.differentiable + len(ctx.options)
        if grad_out is None:  # no gradient arrived from above
            return (None,) * (arguments.differentiable + others)
        kept, saved = _split(ctx.saved_tensors, len(arguments.kept))
        inputs, (counts_E, trained_E) = _split(kept, arguments.differentiable)
        if not any(ctx.needs_input_grad[:_PARAMETERS]):
            trained_E = no_expert()
        tokens = (*inputs, counts_E, trained_E)
        gradients = iter(backward(grad_out, *tokens, *not_saved, *saved, *ctx.options))
        skipped = 0 if has_gradients(trained_E) else _PARAMETERS
        of_inputs = (
            None if each is None or place < skipped else next(gradients)
            for place, each in enumerate(inputs)
        )
        return *of_inputs, *(None for _ in range(others))

    forward.register_autograd(differentiate, setup_context=setup_context)


def _split(tensors: tuple[Tensor, ...], first: int) -> tuple[tuple[Tensor, ...], ...]:
    return tensors[:first], tensors[first:]
