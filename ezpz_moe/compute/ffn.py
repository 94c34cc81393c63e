"""The expert FFN and the routed layer, forward and backward, over any :class:`.Grouping`.

Both keep gate and up for backward, and compute everything else again that a product is not needed
for. The routed layer gathers x again, and applies the scores to the hidden rows, so that their
gradient needs no output of the experts.

Legend of the suffixes: :mod:`.contract`. G = rows that may belong to an expert: without the tail
where its length is known.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.autograd import Kernels
from ezpz_moe.compute.biases import (
    bias_gradient,
    bias_matrices,
    score_gradients,
    sums_like,
)
from ezpz_moe.compute.dispatch import row_order, sum_by_token
from ezpz_moe.compute.elementwise import hidden_gradients_, hidden_rows
from ezpz_moe.compute.grouping import Grouping
from ezpz_moe.compute.layer import Experts, Read, learning_of
from ezpz_moe.compute.layouts import laid_out_like

_KERNELS = ("mm", "mm_backward", "ffn", "ffn_backward", "routed", "routed_backward")


def kernels_of(grouping: type[Grouping]) -> Kernels:
    """Return the kernels of the backend that multiplies by ``grouping``."""
    _, _, *options = inspect.signature(grouping.of_counts).parameters.values()

    def kernel(name: str) -> Callable[..., Any]:
        return lambda *arguments: globals()[f"_{name}"](grouping, *arguments)

    return kernels_by_name(kernel, options)


def kernels_by_name(
    kernel: Callable[[str], Callable[..., Any]], options: Sequence[inspect.Parameter] = ()
) -> Kernels:
    """Return the kernels that ``kernel`` returns for each name, with signatures that say their
    arguments: those of :class:`.Kernels`, and the backend's options.
    """
    found = {name: kernel(name) for name in _KERNELS}
    for name, function in found.items():
        # torch reads an operator's schema from the signature: without `grouping`, and with the
        # options by name where the functions below write *options.
        signature = inspect.signature(globals()[f"_{name}"])
        _, *own, _ = signature.parameters.values()
        signature = signature.replace(parameters=[*own, *options])
        function.__signature__ = signature  # type: ignore[attr-defined]
    return Kernels(**found)


# --- the grouped product --------------------------------------------------------------------------


def _mm(
    grouping: type[Grouping], A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, *options: Any
) -> Tensor:
    groups = grouping.of_offsets(offs_E, A_RK, *options)
    return groups.zero_tail_(groups.multiply(groups.operand(A_RK), B_EKN))


def _mm_backward(
    grouping: type[Grouping],
    grad_C_RN: Tensor,
    A_RK: Tensor,
    B_EKN: Tensor,
    offs_E: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    groups = grouping.of_offsets(offs_E, A_RK, *options)
    grad_C = groups.operand(grad_C_RN)
    grad_A_RK = groups.zero_tail_(groups.multiply(grad_C, B_EKN.transpose(1, 2)))
    grad_B_EKN = groups.weight_gradient(groups.operand(A_RK), grad_C, B_EKN)
    return laid_out_like(grad_A_RK, A_RK), grad_B_EKN


# --- the expert FFN -------------------------------------------------------------------------------


def _product(
    experts: Experts,
    rows: Read,
    weights_EYX: Tensor,
    bias_EY: Tensor | None,
    columns: Read | None,
    dtype: torch.dtype,
    out_RY: Tensor | None = None,
) -> Tensor:
    """Compute ``rows @ weights.T``, and add the bias if there is one."""
    weights_EXY = weights_EYX.transpose(1, 2)
    if bias_EY is None:
        return experts.groups.multiply(rows.operand, weights_EXY, out_RY)
    assert columns is not None  # as there are biases
    pairs = (rows.operand, weights_EXY, columns.operand, bias_matrices(bias_EY, dtype))
    return experts.groups.multiply_sum(*pairs, out_RY)


def _gate_and_up(experts: Experts, x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up; without a gate up is [R, 0]."""
    x, ones = experts.read(x_RD), experts.ones(x_RD)
    gate_RF = _product(experts, x, experts.w1_EFD, experts.b1_EF, ones, x_RD.dtype)
    if experts.w3_EFD is None:
        return gate_RF, gate_RF.new_empty(gate_RF.shape[0], 0)
    return gate_RF, _product(experts, x, experts.w3_EFD, experts.b3_EF, ones, x_RD.dtype)


def _hidden_gradients(
    experts: Experts,
    grad_y: Read,
    columns: Read | None,
    gate_RF: Tensor,
    up_RF: Tensor,
    score_R: Tensor | None = None,
    grad_score_R: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Differentiate down to gate and up; write the scores' gradient, without b2's part of it.

    Returns:
        The gradients of w2 and b2 by name, that of gate, and that of up, None without a gate.
    """
    # Two [R, F] in all, or one without a gate: fresh memory costs an allocator the most.
    groups, activation = experts.groups, experts.activation
    hidden_RF = torch.empty_like(gate_RF)
    activated_RF = torch.empty_like(gate_RF) if activation.is_gated else None
    hidden_rows(activation, *experts.owned(gate_RF, up_RF, hidden_RF, activated_RF, score_R))
    of_second = {}
    if experts.learns:
        hidden = experts.read(hidden_RF)
        of_second["w2_EDF"] = experts.weight_gradient(grad_y, hidden, experts.w2_EDF)
        of_second |= _of_bias(experts, "b2_ED", grad_y, columns, gate_RF.dtype)

    # hidden is no longer needed: its gradient takes over the memory, and then gate's.
    grad_gate_RF, grad_up_RF = (
        groups.multiply(grad_y.operand, experts.w2_EDF, hidden_RF),
        activated_RF,
    )
    hidden_gradients_(
        activation,
        *experts.owned(grad_gate_RF, activated_RF, gate_RF, up_RF, score_R, grad_score_R),
    )
    return of_second, grad_gate_RF, grad_up_RF


def _input_gradients(
    experts: Experts,
    x_RD: Tensor,
    grad_gate_RF: Tensor,
    grad_up_RF: Tensor | None,
    out_RD: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of w1, w3, b1 and b3 by name, and that of x's rows.

    ``out_RD`` is memory that the latter may take: that of x, which is then no longer needed.
    """
    groups, w1_EFD, w3_EFD = experts.groups, experts.w1_EFD, experts.w3_EFD
    grad_gate = experts.read(grad_gate_RF)
    grad_up = None if w3_EFD is None else experts.read(grad_up_RF)
    of_first = _of_first(experts, x_RD, grad_gate, grad_up) if experts.learns else {}
    if grad_up is None:
        return of_first, groups.multiply(grad_gate.operand, w1_EFD, out_RD)
    pairs = (grad_gate.operand, w1_EFD, grad_up.operand, w3_EFD)
    return of_first, groups.multiply_sum(*pairs, out_RD)


def _of_first(
    experts: Experts, x_RD: Tensor, grad_gate: Read, grad_up: Read | None
) -> dict[str, Tensor]:
    """Return the gradients of w1, w3, b1 and b3 by name."""
    x, ones = experts.read(x_RD), experts.ones(x_RD)
    of_first = {"w1_EFD": experts.weight_gradient(grad_gate, x, experts.w1_EFD)}
    of_first |= _of_bias(experts, "b1_EF", grad_gate, ones, x_RD.dtype)
    if grad_up is not None and experts.w3_EFD is not None:
        of_first["w3_EFD"] = experts.weight_gradient(grad_up, x, experts.w3_EFD)
        of_first |= _of_bias(experts, "b3_EF", grad_up, ones, x_RD.dtype)
    return of_first


def _of_bias(
    experts: Experts, name: str, gradient: Read, columns: Read | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    bias_EX = getattr(experts, name)
    if bias_EX is None or columns is None:
        return {}
    sums_EXC = experts.weight_gradient(gradient, columns, sums_like(bias_EX, dtype))
    return {name: bias_gradient(sums_EXC, bias_EX)}


def _in_order(gradients: dict[str, Tensor]) -> list[Tensor]:
    """Return the gradients of parameters in the order of arguments."""
    return [gradients[name] for name in Experts._fields if name in gradients]


def _ffn(
    grouping: type[Grouping],
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    activation: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = grouping.of_counts(counts_E, x_RD, *options)
    activate = ACTIVATIONS[activation]
    experts = Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups)
    gate_RF, up_RF = _gate_and_up(experts, x_RD)
    hidden_RF = torch.empty_like(gate_RF)
    hidden_rows(activate, *experts.owned(gate_RF, up_RF, hidden_RF))
    hidden, ones = experts.read(hidden_RF), experts.ones(x_RD)
    y_RD = _product(experts, hidden, w2_EDF, b2_ED, ones, x_RD.dtype)
    return groups.zero_tail_(y_RD), gate_RF, up_RF


def _ffn_backward(
    grouping: type[Grouping],
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_RD: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    activation: str,
    *options: Any,
) -> list[Tensor]:
    groups = grouping.of_counts(counts_E, x_RD, *options)
    activate = ACTIVATIONS[activation]
    learns = learning_of(grouping, trained_E, counts_E, x_RD, options)
    experts = Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups, *learns)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(experts, x_RD)
    grad_y, ones = experts.read(grad_y_RD), experts.ones(x_RD)
    of_second, grad_gate_RF, grad_up_RF = _hidden_gradients(experts, grad_y, ones, gate_RF, up_RF)
    of_first, grad_x_RD = _input_gradients(experts, x_RD, grad_gate_RF, grad_up_RF)
    return [
        *_in_order(of_first | of_second),
        laid_out_like(groups.zero_tail_(grad_x_RD), x_RD),
    ]


# --- the routed layer -----------------------------------------------------------------------------


def _gathered(tokens_TD: Tensor, token_R: Tensor, dtype: torch.dtype) -> Tensor:
    # Cast first: there are K times as many rows as tokens.
    return tokens_TD.to(dtype).index_select(0, token_R)


def _routed(
    grouping: type[Grouping],
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    num_rows: int,
    dtype: torch.dtype,
    activation: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order_R = row_order(ids_TK, num_rows)
    token_R, score_R = order_R // ids_TK.shape[1], scores_TK.flatten()[order_R]
    x_RD = _gathered(x_TD, token_R, dtype)
    groups = grouping.of_counts(counts_E, x_RD, *options)
    activate = ACTIVATIONS[activation]
    experts = Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups)
    gate_RF, up_RF = _gate_and_up(experts, x_RD)
    hidden_RF = torch.empty_like(gate_RF)
    hidden_rows(activate, *experts.owned(gate_RF, up_RF, hidden_RF, None, score_R))
    hidden, scores = experts.read(hidden_RF), experts.columns(score_R, x_RD)
    # x's rows are no longer needed: those of y take over the memory.
    y_RD = _product(experts, hidden, w2_EDF, b2_ED, scores, dtype, x_RD)
    # The sum is rounded to x's dtype, not first to that of the products.
    y_RD = groups.zero_tail_(y_RD).to(x_TD.dtype)
    return sum_by_token(y_RD, token_R, x_TD.shape[0]), gate_RF, up_RF, order_R


def _routed_backward(
    grouping: type[Grouping],
    grad_out_TD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor | None,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    b3_EF: Tensor | None,
    x_TD: Tensor,
    scores_TK: Tensor,
    counts_E: Tensor,
    trained_E: Tensor | None,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    order_R: Tensor,
    dtype: torch.dtype,
    activation: str,
    *options: Any,
) -> list[Tensor]:
    token_R, score_R = order_R // scores_TK.shape[1], scores_TK.flatten()[order_R]
    grad_y_RD = _gathered(grad_out_TD, token_R, dtype)
    groups = grouping.of_counts(counts_E, grad_y_RD, *options)
    activate = ACTIVATIONS[activation]
    learns = learning_of(grouping, trained_E, counts_E, grad_y_RD, options)
    experts = Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups, *learns)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(experts, _gathered(x_TD, token_R, dtype))
    wider = torch.promote_types(score_R.dtype, torch.float32)
    grad_score_R = torch.empty_like(score_R, dtype=wider)
    grad_y, scores = experts.read(grad_y_RD), experts.columns(score_R, grad_y_RD)
    of_second, grad_gate_RF, grad_up_RF = _hidden_gradients(
        experts, grad_y, scores, gate_RF, up_RF, score_R, grad_score_R
    )
    if b2_ED is not None:
        grad_score_R += score_gradients(grad_out_TD, b2_ED.to(dtype), token_R, counts_E)
    groups.zero_tail_(grad_score_R.unsqueeze(1))
    grad_score_R = grad_score_R.to(scores_TK.dtype)
    grad_scores_TK = torch.zeros_like(scores_TK.flatten()).index_copy_(0, order_R, grad_score_R)

    # The gradient of y is no longer needed: x takes over the memory, and then x's gradient.
    x_RD = torch.index_select(x_TD.to(dtype), 0, token_R, out=grad_y_RD)
    of_first, grad_x_RD = _input_gradients(experts, x_RD, grad_gate_RF, grad_up_RF, x_RD)
    grad_x_TD = sum_by_token(groups.zero_tail_(grad_x_RD).to(x_TD.dtype), token_R, x_TD.shape[0])
    return [
        *_in_order(of_first | of_second),
        laid_out_like(grad_x_TD, x_TD),
        laid_out_like(grad_scores_TK.view(scores_TK.shape), scores_TK),
    ]
