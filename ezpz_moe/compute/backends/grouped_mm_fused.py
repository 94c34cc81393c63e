"""``grouped_mm_fused``: the expert FFN on ``torch._grouped_mm`` with its own backward.

The host's layer leaves its three products and the SwiGLU between them to autograd, which keeps four
[R, F] tensors and runs one pass per operation in the elementwise part of backward. Here all of it
is one function that keeps two tensors. Its forward makes the same calls in the same order: the
host's numbers, bit for bit, if it computes in the same dtype.

``torch._grouped_mm`` neither reads nor writes tail rows. They are set to zero in the results,
without a device sync. It runs wherever ``grouped_mm`` does.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.backends.grouped_mm import aligned, reasons_against, row_major
from ezpz_moe.compute.contract import (
    is_transposed,
    laid_out_like,
    offsets_of_counts,
    offsets_on_device,
)
from ezpz_moe.compute.elementwise import swiglu_gradients_


def _product(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    """Compute ``A[r] @ B[expert of r]``; tail rows are unwritten."""
    return products.grouped_mm(row_major(A_RK), aligned(B_EKN), offs_E)


def _weight_gradient(left_RM: Tensor, right_RN: Tensor, offs_E: Tensor, like: Tensor) -> Tensor:
    """Compute ``left[rows].T @ right[rows]`` per expert, laid out like ``like`` [E, M, N]."""
    if is_transposed(like):
        grad_ENM = _weight_gradient(right_RN, left_RM, offs_E, like.transpose(1, 2))
        return grad_ENM.transpose(1, 2)
    grad_EMN = products.grouped_outer(row_major(left_RM), row_major(right_RN), offs_E)
    return laid_out_like(grad_EMN, like)


def _zero_tail(rows_RX: Tensor, offs_E: Tensor) -> Tensor:
    if offs_E.is_cpu:  # here the number of tail rows is known without waiting
        torch.tensor_split(rows_RX, offs_E[-1:].long())[1].zero_()
        return rows_RX
    tail_R = torch.arange(rows_RX.shape[0], device=rows_RX.device) >= offs_E[-1]
    return rows_RX.masked_fill_(tail_R.unsqueeze(1), 0)


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    offs_E = offsets_on_device(offs_E, A_RK).int()
    return _zero_tail(_product(A_RK, B_EKN, offs_E), offs_E)


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    offs_E = offsets_on_device(offs_E, A_RK).int()
    grad_A_RK = _zero_tail(_product(grad_C_RN, B_EKN.transpose(1, 2), offs_E), offs_E)
    return laid_out_like(grad_A_RK, A_RK), _weight_gradient(A_RK, grad_C_RN, offs_E, B_EKN)


def _gate_and_up(
    w1_EFD: Tensor, w3_EFD: Tensor, x_RD: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    gate_RF = _product(x_RD, w1_EFD.transpose(1, 2), offs_E)
    return gate_RF, _product(x_RD, w3_EFD.transpose(1, 2), offs_E)


def _swiglu(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    offs_E = offsets_of_counts(num_tokens_per_expert_E, x_RD).int()
    gate_RF, up_RF = _gate_and_up(w1_EFD, w3_EFD, x_RD, offs_E)
    # In place on silu's result, which nobody keeps: the bits are those of the host's product.
    y_RD = _product(F.silu(gate_RF).mul_(up_RF), w2_EDF.transpose(1, 2), offs_E)
    return _zero_tail(y_RD, offs_E), gate_RF, up_RF


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
    offs_E = offsets_of_counts(num_tokens_per_expert_E, x_RD).int()
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(w1_EFD, w3_EFD, x_RD, offs_E)
    activated_RF = F.silu(gate_RF)
    # w2's gradient first: swiglu_gradients_ overwrites activated.
    grad_w2_EDF = _weight_gradient(grad_y_RD, activated_RF * up_RF, offs_E, w2_EDF)

    grad_hidden_RF = _product(grad_y_RD, w2_EDF, offs_E)
    grad_gate_RF, grad_up_RF = swiglu_gradients_(grad_hidden_RF, activated_RF, gate_RF, up_RF)

    # Both paths to x, through gate and through up. aligned() copies weights only if their strides
    # do not suit.
    grad_x_RD = products.grouped_mm_sum(
        *(row_major(grad_gate_RF), aligned(w1_EFD)),
        *(row_major(grad_up_RF), aligned(w3_EFD)),
        offs_E,
    )
    return (
        _weight_gradient(grad_gate_RF, x_RD, offs_E, w1_EFD),
        grad_w2_EDF,
        _weight_gradient(grad_up_RF, x_RD, offs_E, w3_EFD),
        laid_out_like(_zero_tail(grad_x_RD, offs_E), x_RD),
    )


@dataclass(frozen=True)
class GroupedMMFused(KernelBackend):
    """``torch._grouped_mm`` with its own backward. See the module's text."""

    name = "grouped_mm_fused"
    summary = "torch._grouped_mm as the host calls it, with a backward that keeps less"
    host_syncs = False
    static_shapes = True
    operators = Operators("grouped_mm_fused", Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward))

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        return reasons_against(device, dtype, dims)


BACKEND = GroupedMMFused()
