"""``for_loop``: one matrix product per expert, over the rows that the expert owns.

Runs wherever torch multiplies matrices: Intel XPU, NVIDIA before SM90, ROCm, Ascend, CPU. It costs
one device-to-host copy of the counts per call, and one kernel launch per expert and product.

Indexing the weights with ``w[e]`` under autograd makes the loop quadratic: each ``select`` writes a
full-size zero gradient [E, F, D] and adds it. Here every gradient is one buffer, and each expert's
product writes its own slice of it, once. Elementwise work covers all rows at once.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. n = rows that belong to an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.contract import counts_of_offsets, counts_on_host
from ezpz_moe.compute.elementwise import swiglu_gradients_

Views = Sequence[Tensor]
"""One view per expert. A single call makes them all, for every product of the same rows: indexing
in the loop costs as much as launching a small product."""


def _rows(rows_RX: Tensor, counts: list[int]) -> Views:
    """Return every expert's rows [n, X]; tail rows belong to nobody."""
    return rows_RX[: sum(counts)].split(counts)


def _columns(rows_RX: Tensor, counts: list[int]) -> Views:
    """Return every expert's rows, transposed: [X, n]."""
    return rows_RX[: sum(counts)].T.split(counts, dim=1)


def _multiply(A_nK: Views, B_KN: Views, out_nN: Views) -> None:
    for A, B, out in zip(A_nK, B_KN, out_nN, strict=True):
        # An expert without rows writes nothing: skip its launch.
        if len(A):
            products.mm(A, B, out)


def _multiply_sum(A_nK: Views, B_KN: Views, A2_nL: Views, B2_LN: Views, out_nN: Views) -> None:
    for A, B, A2, B2, out in zip(A_nK, B_KN, A2_nL, B2_LN, out_nN, strict=True):
        if len(A):
            products.mm_sum(A, B, A2, B2, out)


def _weight_gradient(left_Mn: Views, right_nN: Views, like_EMN: Tensor) -> Tensor:
    """Compute ``left @ right`` for every expert, laid out like ``like_EMN``.

    An expert without rows gets zero, the sum over nothing.
    """
    # empty, not zeros: every slice is written once, also that of an idle expert.
    grad_EMN = torch.empty_like(like_EMN)
    for left, right, grad in zip(left_Mn, right_nN, grad_EMN.unbind(), strict=True):
        products.mm(left, right, grad)
    return grad_EMN


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    counts = counts_of_offsets(offs_E, A_RK.shape[0])
    C_RN = A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2])
    _multiply(_rows(A_RK, counts), B_EKN.unbind(), _rows(C_RN, counts))
    C_RN[sum(counts) :].zero_()
    return C_RN


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    counts = counts_of_offsets(offs_E, A_RK.shape[0])
    grad_A_RK = torch.empty_like(A_RK)
    grad_C_nN = _rows(grad_C_RN, counts)
    _multiply(grad_C_nN, B_EKN.transpose(1, 2).unbind(), _rows(grad_A_RK, counts))
    grad_A_RK[sum(counts) :].zero_()
    return grad_A_RK, _weight_gradient(_columns(A_RK, counts), grad_C_nN, B_EKN)


def _gate_and_up(
    w1_EFD: Tensor, w3_EFD: Tensor, x_RD: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor]:
    # Tail rows stay unwritten: for_loop's backward reads only the rows that belong to an expert.
    gate_RF, up_RF = (x_RD.new_empty(x_RD.shape[0], w1_EFD.shape[1]) for _ in range(2))
    x_nD = _rows(x_RD, counts)
    _multiply(x_nD, w1_EFD.transpose(1, 2).unbind(), _rows(gate_RF, counts))
    _multiply(x_nD, w3_EFD.transpose(1, 2).unbind(), _rows(up_RF, counts))
    return gate_RF, up_RF


def _swiglu(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    counts = counts_on_host(num_tokens_per_expert_E, x_RD.shape[0])
    n = sum(counts)
    gate_RF, up_RF = _gate_and_up(w1_EFD, w3_EFD, x_RD, counts)
    hidden_nF = F.silu(gate_RF[:n]).mul_(up_RF[:n])
    # new_empty, not empty_like: outputs are contiguous, whatever x's strides.
    y_RD = x_RD.new_empty(x_RD.shape)
    _multiply(_rows(hidden_nF, counts), w2_EDF.transpose(1, 2).unbind(), _rows(y_RD, counts))
    y_RD[n:].zero_()
    return y_RD, gate_RF, up_RF


def _swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = counts_on_host(num_tokens_per_expert_E, x_RD.shape[0])
    n = sum(counts)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(w1_EFD, w3_EFD, x_RD, counts)
    gate_nF, up_nF = gate_RF[:n], up_RF[:n]
    # Two [R, F] buffers in all: fresh memory costs an allocator the most.
    activated_nF = F.silu(gate_nF)
    hidden_nF = activated_nF * up_nF
    hidden = _rows(hidden_nF, counts)
    # w2's gradient first: what follows overwrites hidden and activated.
    grad_w2_EDF = _weight_gradient(_columns(grad_y_RD, counts), hidden, w2_EDF)

    # hidden is no longer needed: its gradient takes over the memory.
    grad_hidden_nF, grad_hidden = hidden_nF, hidden
    _multiply(_rows(grad_y_RD, counts), w2_EDF.unbind(), grad_hidden)
    grad_gate_nF, grad_up_nF = swiglu_gradients_(grad_hidden_nF, activated_nF, gate_nF, up_nF)

    x_nD, grad_x_RD = _rows(x_RD, counts), torch.empty_like(x_RD)
    _multiply_sum(
        *(_rows(grad_gate_nF, counts), w1_EFD.unbind()),
        *(_rows(grad_up_nF, counts), w3_EFD.unbind()),
        _rows(grad_x_RD, counts),
    )
    grad_x_RD[n:].zero_()
    return (
        _weight_gradient(_columns(grad_gate_nF, counts), x_nD, w1_EFD),
        grad_w2_EDF,
        _weight_gradient(_columns(grad_up_nF, counts), x_nD, w3_EFD),
        grad_x_RD,
    )


@dataclass(frozen=True)
class ForLoop(KernelBackend):
    """One product per expert. See the module's text."""

    name = "for_loop"
    summary = "one torch.mm per expert; runs on every device"
    host_syncs = True
    static_shapes = False
    operators = Operators("for_loop", Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward))


BACKEND = ForLoop()
