"""The expert FFN and the routed layer, forward and backward, over any :class:`.Grouping`.

Both keep gate and up for backward, and compute everything else again that a product is not needed
for. The routed layer gathers x again, and applies the scores to the hidden rows, so that their
gradient needs no output of the experts.

Legend of the suffixes: :mod:`.contract`. G = rows that may belong to an expert: without the tail
where its length is known.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.autograd import Kernels
from ezpz_moe.compute.contract import laid_out_like
from ezpz_moe.compute.dispatch import row_order, sum_by_token
from ezpz_moe.compute.elementwise import (
    scaled_swiglu,
    scaled_swiglu_gradients_,
    swiglu,
    swiglu_gradients_,
)
from ezpz_moe.compute.grouping import Grouping


def kernels_of(grouping: type[Grouping]) -> Kernels:
    """Return the kernels of the backend that multiplies by ``grouping``."""
    names = ("mm", "mm_backward", "ffn", "ffn_backward", "routed", "routed_backward")
    return Kernels(**{name: _kernel(globals()[f"_{name}"], grouping) for name in names})


def _kernel(function: Callable[..., Any], grouping: type[Grouping]) -> Callable[..., Any]:
    """Return ``function`` for that grouping, with the options that it takes in its signature."""

    @wraps(function)
    def kernel(*arguments: Any) -> Any:
        return function(grouping, *arguments)

    # torch reads an operator's schema from the signature: without `grouping` itself, and with the
    # options by name where the functions below write *options.
    _, *tensors, _ = inspect.signature(function).parameters.values()
    _, _, *options = inspect.signature(grouping.of_counts).parameters.values()
    signature = inspect.signature(function).replace(parameters=[*tensors, *options])
    kernel.__signature__ = signature  # type: ignore[attr-defined]
    return kernel


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


def _gate_and_up(groups: Grouping, w1_EFD: Tensor, w3_EFD: Tensor, x: Any) -> tuple[Tensor, Tensor]:
    return groups.multiply(x, w1_EFD.transpose(1, 2)), groups.multiply(x, w3_EFD.transpose(1, 2))


def _ffn(
    grouping: type[Grouping],
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = grouping.of_counts(num_tokens_per_expert_E, x_RD, *options)
    gate_RF, up_RF = _gate_and_up(groups, w1_EFD, w3_EFD, groups.operand(x_RD))
    hidden_RF = torch.empty_like(gate_RF)
    swiglu(*map(groups.owned, (gate_RF, up_RF, hidden_RF)))
    y_RD = groups.multiply(groups.operand(hidden_RF), w2_EDF.transpose(1, 2))
    return groups.zero_tail_(y_RD), gate_RF, up_RF


def _ffn_backward(
    grouping: type[Grouping],
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = grouping.of_counts(num_tokens_per_expert_E, x_RD, *options)
    x, grad_y = groups.operand(x_RD), groups.operand(grad_y_RD)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(groups, w1_EFD, w3_EFD, x)
    # Two [R, F] in all: fresh memory costs an allocator the most.
    activated_RF, hidden_RF = torch.empty_like(gate_RF), torch.empty_like(gate_RF)
    swiglu(*map(groups.owned, (gate_RF, up_RF, hidden_RF, activated_RF)))
    grad_w2_EDF = groups.weight_gradient(grad_y, groups.operand(hidden_RF), w2_EDF)

    # hidden is no longer needed: its gradient takes over the memory, and then gate's.
    grad_gate_RF, grad_up_RF = groups.multiply(grad_y, w2_EDF, hidden_RF), activated_RF
    swiglu_gradients_(*map(groups.owned, (grad_gate_RF, activated_RF, gate_RF, up_RF)))
    grad_gate, grad_up = groups.operand(grad_gate_RF), groups.operand(grad_up_RF)
    grad_x_RD = groups.multiply_sum(grad_gate, w1_EFD, grad_up, w3_EFD)
    return (
        groups.weight_gradient(grad_gate, x, w1_EFD),
        grad_w2_EDF,
        groups.weight_gradient(grad_up, x, w3_EFD),
        laid_out_like(groups.zero_tail_(grad_x_RD), x_RD),
    )


# --- the routed layer -----------------------------------------------------------------------------


def _gathered(tokens_TD: Tensor, token_R: Tensor, dtype: torch.dtype) -> Tensor:
    # Cast first: there are K times as many rows as tokens.
    return tokens_TD.to(dtype).index_select(0, token_R)


def _routed(
    grouping: type[Grouping],
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    num_tokens_per_expert_E: Tensor,
    num_rows: int,
    dtype: torch.dtype,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order_R = row_order(ids_TK, num_rows)
    token_R, score_R = order_R // ids_TK.shape[1], scores_TK.flatten()[order_R]
    x_RD = _gathered(x_TD, token_R, dtype)
    groups = grouping.of_counts(num_tokens_per_expert_E, x_RD, *options)
    gate_RF, up_RF = _gate_and_up(groups, w1_EFD, w3_EFD, groups.operand(x_RD))
    hidden_RF = torch.empty_like(gate_RF)
    scaled_swiglu(*map(groups.owned, (gate_RF, up_RF, score_R, hidden_RF)))
    # x's rows are no longer needed: those of y take over the memory.
    y_RD = groups.multiply(groups.operand(hidden_RF), w2_EDF.transpose(1, 2), x_RD)
    # The sum is rounded to x's dtype, not first to that of the products.
    y_RD = groups.zero_tail_(y_RD).to(x_TD.dtype)
    return sum_by_token(y_RD, token_R, x_TD.shape[0]), gate_RF, up_RF, order_R


def _routed_backward(
    grouping: type[Grouping],
    grad_out_TD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_TD: Tensor,
    scores_TK: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    order_R: Tensor,
    dtype: torch.dtype,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    token_R, score_R = order_R // scores_TK.shape[1], scores_TK.flatten()[order_R]
    grad_y_RD = _gathered(grad_out_TD, token_R, dtype)
    groups = grouping.of_counts(num_tokens_per_expert_E, grad_y_RD, *options)
    if gate_RF is None or up_RF is None:
        x = groups.operand(_gathered(x_TD, token_R, dtype))
        gate_RF, up_RF = _gate_and_up(groups, w1_EFD, w3_EFD, x)
        del x
    # Two [R, F] and one [R, D] in all: fresh memory costs an allocator the most.
    activated_RF, scaled_RF = torch.empty_like(gate_RF), torch.empty_like(gate_RF)
    scaled_swiglu(*map(groups.owned, (gate_RF, up_RF, score_R, scaled_RF, activated_RF)))
    grad_y = groups.operand(grad_y_RD)
    grad_w2_EDF = groups.weight_gradient(grad_y, groups.operand(scaled_RF), w2_EDF)

    grad_gate_RF, grad_up_RF = groups.multiply(grad_y, w2_EDF, scaled_RF), activated_RF
    grad_score_R = torch.empty_like(score_R)
    scaled_swiglu_gradients_(
        *map(groups.owned, (grad_gate_RF, activated_RF, gate_RF, up_RF, score_R, grad_score_R))
    )
    groups.zero_tail_(grad_score_R.unsqueeze(1))
    grad_scores_TK = torch.zeros_like(scores_TK.flatten()).index_copy_(0, order_R, grad_score_R)

    # The gradient of y is no longer needed: x takes over the memory, and then x's gradient.
    x_RD = torch.index_select(x_TD.to(dtype), 0, token_R, out=grad_y_RD)
    x, grad_gate, grad_up = map(groups.operand, (x_RD, grad_gate_RF, grad_up_RF))
    grad_w1_EFD = groups.weight_gradient(grad_gate, x, w1_EFD)
    grad_w3_EFD = groups.weight_gradient(grad_up, x, w3_EFD)
    grad_x_RD = groups.multiply_sum(grad_gate, w1_EFD, grad_up, w3_EFD, x_RD)
    grad_x_TD = sum_by_token(groups.zero_tail_(grad_x_RD).to(x_TD.dtype), token_R, x_TD.shape[0])
    return (
        grad_w1_EFD,
        grad_w2_EDF,
        grad_w3_EFD,
        laid_out_like(grad_x_TD, x_TD),
        laid_out_like(grad_scores_TK.view(scores_TK.shape), scores_TK),
    )
