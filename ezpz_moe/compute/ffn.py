"""The expert FFN and the routed layer, forward and backward, over any :class:`.Grouping`.

Both keep gate and up for backward, and compute everything else again that a product is not needed
for. The routed layer gathers x again, and applies the scores to the hidden rows, so that their
gradient needs no output of the experts.

Legend of the suffixes: :mod:`.contract`. G = rows that may belong to an expert: without the tail
where its length is known.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ezpz_moe.compute.activations import ACTIVATIONS, Activation
from ezpz_moe.compute.autograd import Kernels
from ezpz_moe.compute.biases import (
    bias_columns,
    bias_gradient,
    bias_matrices,
    score_gradients,
    sums_like,
)
from ezpz_moe.compute.dispatch import row_order, sum_by_token
from ezpz_moe.compute.elementwise import hidden_gradients_, hidden_rows
from ezpz_moe.compute.grouping import Grouping
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


class _Experts(NamedTuple):
    """The parameters of a layer, None for what it does not have, and how its rows are grouped.

    An operand named ``ones`` is the :func:`.bias_columns` of ones, None without biases.
    """

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor | None
    b1_EF: Tensor | None
    b2_ED: Tensor | None
    b3_EF: Tensor | None
    activation: Activation
    groups: Grouping

    def columns(self, factor_R: Tensor, like: Tensor) -> Any:
        """Return the operand that adds biases to a product, each row with its factor."""
        if self.b1_EF is None:
            return None
        return self.groups.operand(bias_columns(factor_R, like.dtype))

    def ones(self, rows_RX: Tensor) -> Any:
        return self.columns(rows_RX.new_ones(rows_RX.shape[0]), rows_RX)

    def owned(self, *rows_RX: Tensor | None) -> list[Tensor | None]:
        """Return :meth:`.Grouping.owned` of each; None for None."""
        return [None if each is None else self.groups.owned(each) for each in rows_RX]


def _product(
    experts: _Experts,
    rows: Any,
    weights_EYX: Tensor,
    bias_EY: Tensor | None,
    columns: Any,
    dtype: torch.dtype,
    out_RY: Tensor | None = None,
) -> Tensor:
    """Compute ``rows @ weights.T``, and add the bias if there is one."""
    weights_EXY = weights_EYX.transpose(1, 2)
    if bias_EY is None:
        return experts.groups.multiply(rows, weights_EXY, out_RY)
    matrices_ECY = bias_matrices(bias_EY, dtype)
    return experts.groups.multiply_sum(rows, weights_EXY, columns, matrices_ECY, out_RY)


def _gate_and_up(experts: _Experts, x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate and up; without a gate up is [R, 0]."""
    x, ones = experts.groups.operand(x_RD), experts.ones(x_RD)
    gate_RF = _product(experts, x, experts.w1_EFD, experts.b1_EF, ones, x_RD.dtype)
    if experts.w3_EFD is None:
        return gate_RF, gate_RF.new_empty(gate_RF.shape[0], 0)
    return gate_RF, _product(experts, x, experts.w3_EFD, experts.b3_EF, ones, x_RD.dtype)


def _hidden_gradients(
    experts: _Experts,
    grad_y: Any,
    columns: Any,
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
    of_second = {
        "w2_EDF": groups.weight_gradient(grad_y, groups.operand(hidden_RF), experts.w2_EDF)
    }
    of_second |= _of_bias(experts, "b2_ED", grad_y, columns, gate_RF.dtype)

    # hidden is no longer needed: its gradient takes over the memory, and then gate's.
    grad_gate_RF, grad_up_RF = groups.multiply(grad_y, experts.w2_EDF, hidden_RF), activated_RF
    hidden_gradients_(
        activation,
        *experts.owned(grad_gate_RF, activated_RF, gate_RF, up_RF, score_R, grad_score_R),
    )
    return of_second, grad_gate_RF, grad_up_RF


def _input_gradients(
    experts: _Experts,
    x_RD: Tensor,
    grad_gate_RF: Tensor,
    grad_up_RF: Tensor | None,
    out_RD: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the gradients of w1, w3, b1 and b3 by name, and that of x's rows.

    ``out_RD`` is memory that the latter may take: that of x, which is then no longer needed.
    """
    groups, w1_EFD, w3_EFD = experts.groups, experts.w1_EFD, experts.w3_EFD
    x, grad_gate, ones = groups.operand(x_RD), groups.operand(grad_gate_RF), experts.ones(x_RD)
    of_first = {"w1_EFD": groups.weight_gradient(grad_gate, x, w1_EFD)}
    of_first |= _of_bias(experts, "b1_EF", grad_gate, ones, x_RD.dtype)
    if w3_EFD is None:
        return of_first, groups.multiply(grad_gate, w1_EFD, out_RD)
    grad_up = groups.operand(grad_up_RF)
    of_first["w3_EFD"] = groups.weight_gradient(grad_up, x, w3_EFD)
    of_first |= _of_bias(experts, "b3_EF", grad_up, ones, x_RD.dtype)
    return of_first, groups.multiply_sum(grad_gate, w1_EFD, grad_up, w3_EFD, out_RD)


def _of_bias(
    experts: _Experts, name: str, gradient: Any, columns: Any, dtype: torch.dtype
) -> dict[str, Tensor]:
    bias_EX = getattr(experts, name)
    if bias_EX is None:
        return {}
    sums_EXC = experts.groups.weight_gradient(gradient, columns, sums_like(bias_EX, dtype))
    return {name: bias_gradient(sums_EXC, bias_EX)}


def _in_order(gradients: dict[str, Tensor]) -> list[Tensor]:
    """Return the gradients of parameters in the order of arguments."""
    return [gradients[name] for name in _Experts._fields if name in gradients]


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
    activation: str,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = grouping.of_counts(counts_E, x_RD, *options)
    activate = ACTIVATIONS[activation]
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups)
    gate_RF, up_RF = _gate_and_up(experts, x_RD)
    hidden_RF = torch.empty_like(gate_RF)
    hidden_rows(activate, *experts.owned(gate_RF, up_RF, hidden_RF))
    hidden, ones = groups.operand(hidden_RF), experts.ones(x_RD)
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
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    activation: str,
    *options: Any,
) -> list[Tensor]:
    groups = grouping.of_counts(counts_E, x_RD, *options)
    activate = ACTIVATIONS[activation]
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(experts, x_RD)
    grad_y, ones = groups.operand(grad_y_RD), experts.ones(x_RD)
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
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups)
    gate_RF, up_RF = _gate_and_up(experts, x_RD)
    hidden_RF = torch.empty_like(gate_RF)
    hidden_rows(activate, *experts.owned(gate_RF, up_RF, hidden_RF, None, score_R))
    hidden, scores = groups.operand(hidden_RF), experts.columns(score_R, x_RD)
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
    experts = _Experts(w1_EFD, w2_EDF, w3_EFD, b1_EF, b2_ED, b3_EF, activate, groups)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(experts, _gathered(x_TD, token_R, dtype))
    wider = torch.promote_types(score_R.dtype, torch.float32)
    grad_score_R = torch.empty_like(score_R, dtype=wider)
    grad_y, scores = groups.operand(grad_y_RD), experts.columns(score_R, grad_y_RD)
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
