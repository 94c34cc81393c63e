"""``for_loop``: one matrix product per expert, over the rows that the expert owns.

Runs wherever torch multiplies matrices: Intel XPU, NVIDIA before SM90, ROCm, Ascend, CPU. It
costs one device-to-host copy of the counts per call and one kernel launch per expert and product.

Indexing the weights with ``w[e]`` under autograd makes the loop quadratic: each ``select`` writes
a whole zero gradient [E, F, D] and adds it. Here every gradient is one buffer, and each expert's
product writes its own slice of it, once. Elementwise work is done for all rows together.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. n = rows that belong to an expert.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute.autograd import KernelBackend, Kernels
from ezpz_moe.compute.contract import counts_of_offsets, counts_on_host


def _experts_with_rows(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _multiply(A_RK: Tensor, B_EKN: Tensor, counts: list[int], out_RN: Tensor) -> None:
    for e, rows in _experts_with_rows(counts):
        torch.mm(A_RK[rows], B_EKN[e], out=out_RN[rows])


def _multiply_add(A_RK: Tensor, B_EKN: Tensor, counts: list[int], out_RN: Tensor) -> None:
    for e, rows in _experts_with_rows(counts):
        out_RN[rows].addmm_(A_RK[rows], B_EKN[e])


def _weight_gradient(left_RM: Tensor, right_RN: Tensor, counts: list[int], like: Tensor) -> Tensor:
    """``left[rows].T @ right[rows]`` for every expert, laid out like ``like`` [E, M, N]."""
    grad_EMN = torch.empty_like(like)
    for e, count in enumerate(counts):
        if not count:
            grad_EMN[e].zero_()
    for e, rows in _experts_with_rows(counts):
        torch.mm(left_RM[rows].T, right_RN[rows], out=grad_EMN[e])
    return grad_EMN


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    counts = counts_of_offsets(offs_E, A_RK.shape[0])
    C_RN = A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2])
    _multiply(A_RK, B_EKN, counts, C_RN)
    C_RN[sum(counts) :].zero_()
    return C_RN


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    counts = counts_of_offsets(offs_E, A_RK.shape[0])
    grad_A_RK = torch.empty_like(A_RK)
    _multiply(grad_C_RN, B_EKN.transpose(1, 2), counts, grad_A_RK)
    grad_A_RK[sum(counts) :].zero_()
    return grad_A_RK, _weight_gradient(A_RK, grad_C_RN, counts, B_EKN)


def _swiglu(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    R, hidden_dim = x_RD.shape[0], w1_EFD.shape[1]
    counts = counts_on_host(num_tokens_per_expert_E, R)
    n = sum(counts)
    gate_RF, up_RF = (x_RD.new_empty(R, hidden_dim) for _ in range(2))
    y_RD = x_RD.new_empty(x_RD.shape)
    _multiply(x_RD, w1_EFD.transpose(1, 2), counts, gate_RF)
    _multiply(x_RD, w3_EFD.transpose(1, 2), counts, up_RF)
    hidden_nF = F.silu(gate_RF[:n]).mul_(up_RF[:n])
    _multiply(hidden_nF, w2_EDF.transpose(1, 2), counts, y_RD)
    y_RD[n:].zero_()
    return y_RD, gate_RF, up_RF


def _swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = counts_on_host(num_tokens_per_expert_E, x_RD.shape[0])
    n = sum(counts)
    gate_nF, up_nF = gate_RF[:n], up_RF[:n]
    # Two [R, F] buffers in all: fresh memory is what an allocator charges most for.
    activated_nF = F.silu(gate_nF)
    hidden_nF = activated_nF * up_nF
    grad_w2_EDF = _weight_gradient(grad_y_RD, hidden_nF, counts, w2_EDF)

    grad_hidden_nF = hidden_nF
    _multiply(grad_y_RD, w2_EDF, counts, grad_hidden_nF)
    grad_up_nF = activated_nF.mul_(grad_hidden_nF)
    grad_gate_nF = grad_hidden_nF.mul_(up_nF)
    torch.ops.aten.silu_backward.grad_input(grad_gate_nF, gate_nF, grad_input=grad_gate_nF)

    grad_x_RD = torch.empty_like(x_RD)
    _multiply(grad_gate_nF, w1_EFD, counts, grad_x_RD)
    _multiply_add(grad_up_nF, w3_EFD, counts, grad_x_RD)
    grad_x_RD[n:].zero_()
    return (
        _weight_gradient(grad_gate_nF, x_RD, counts, w1_EFD),
        grad_w2_EDF,
        _weight_gradient(grad_up_nF, x_RD, counts, w3_EFD),
        grad_x_RD,
    )


class ForLoop(KernelBackend):
    """One product per expert. See the module's text."""

    name = "for_loop"
    summary = "one torch.mm per expert; runs on every device"
    host_syncs = True
    static_shapes = True


BACKEND = ForLoop(Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward))
