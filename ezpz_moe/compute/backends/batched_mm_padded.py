"""``batched_mm_padded``: every expert padded to the busiest one, then three ``torch.bmm``.

Few large launches instead of one per expert, so it suits many small experts with even routing.
It drops nothing: the padded length C is the largest count, which costs one device-to-host copy.
Under skew it computes and holds E * C rows, however few of them carry tokens; see docs/backends.md.

Tokens are padded once for the three products of forward. What backward needs is kept unpadded,
so that memory held between forward and backward does not grow with skew.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. C = padded rows per expert,
S = E * C padded rows, n = rows that belong to an expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute.autograd import KernelBackend, Kernels
from ezpz_moe.compute.contract import counts_of_offsets, counts_on_host


@dataclass(frozen=True)
class _Padding:
    """Where each of the n rows stands among the S = E * C padded rows."""

    experts: int
    capacity: int
    slots_n: Tensor

    @classmethod
    def of(cls, counts: list[int], device: torch.device) -> "_Padding":
        E, n, capacity = len(counts), sum(counts), max(counts, default=0)
        # non_blocking: torch.tensor(..., device=device) would wait for the device once more
        counts_E = torch.tensor(counts, dtype=torch.int64).to(device, non_blocking=True)
        first_slot_E = torch.arange(E, device=device) * capacity
        first_row_E = torch.cumsum(counts_E, 0) - counts_E
        shift_n = torch.repeat_interleave(first_slot_E - first_row_E, counts_E, output_size=n)
        return cls(E, capacity, torch.arange(n, device=device) + shift_n)

    @property
    def rows(self) -> int:
        return len(self.slots_n)

    def pad(self, rows_RX: Tensor) -> Tensor:
        """[R, X] -> [E, C, X]; the padding is zero, so that it adds nothing to a gradient."""
        padded_SX = rows_RX.new_zeros(self.experts * self.capacity, rows_RX.shape[1])
        padded_SX.index_copy_(0, self.slots_n, rows_RX[: self.rows])
        return padded_SX.view(self.experts, self.capacity, rows_RX.shape[1])

    def unpad(self, padded_ECX: Tensor, num_rows: int) -> Tensor:
        """[E, C, X] -> [R, X]; tail rows are zero."""
        rows_RX = padded_ECX.new_empty(num_rows, padded_ECX.shape[2])
        torch.index_select(padded_ECX.flatten(0, 1), 0, self.slots_n, out=rows_RX[: self.rows])
        rows_RX[self.rows :].zero_()
        return rows_RX


def _like(gradient: Tensor, model: Tensor) -> Tensor:
    """``gradient`` with the strides of ``model`` (a transposed view, say)."""
    return torch.empty_like(model).copy_(gradient)


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    padding = _Padding.of(counts_of_offsets(offs_E, A_RK.shape[0]), A_RK.device)
    return padding.unpad(torch.bmm(padding.pad(A_RK), B_EKN), A_RK.shape[0])


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    padding = _Padding.of(counts_of_offsets(offs_E, A_RK.shape[0]), A_RK.device)
    grad_C_ECN = padding.pad(grad_C_RN)
    grad_A_RK = padding.unpad(torch.bmm(grad_C_ECN, B_EKN.transpose(1, 2)), A_RK.shape[0])
    grad_B_EKN = torch.bmm(padding.pad(A_RK).transpose(1, 2), grad_C_ECN)
    return _like(grad_A_RK, A_RK), _like(grad_B_EKN, B_EKN)


def _swiglu(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    R = x_RD.shape[0]
    padding = _Padding.of(counts_on_host(num_tokens_per_expert_E, R), x_RD.device)
    x_ECD = padding.pad(x_RD)
    gate_ECF = torch.bmm(x_ECD, w1_EFD.transpose(1, 2))
    up_ECF = torch.bmm(x_ECD, w3_EFD.transpose(1, 2))
    y_ECD = torch.bmm(F.silu(gate_ECF).mul_(up_ECF), w2_EDF.transpose(1, 2))
    return padding.unpad(y_ECD, R), padding.unpad(gate_ECF, R), padding.unpad(up_ECF, R)


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
    R = x_RD.shape[0]
    padding = _Padding.of(counts_on_host(num_tokens_per_expert_E, R), x_RD.device)
    x_ECD, grad_y_ECD, gate_ECF, up_ECF = map(padding.pad, (x_RD, grad_y_RD, gate_RF, up_RF))
    activated_ECF = F.silu(gate_ECF)

    grad_w2_EDF = torch.bmm(grad_y_ECD.transpose(1, 2), activated_ECF * up_ECF)
    grad_hidden_ECF = torch.bmm(grad_y_ECD, w2_EDF)
    grad_up_ECF = activated_ECF.mul_(grad_hidden_ECF)
    grad_gate_ECF = torch.ops.aten.silu_backward(grad_hidden_ECF.mul_(up_ECF), gate_ECF)
    grad_x_ECD = torch.bmm(grad_gate_ECF, w1_EFD).baddbmm_(grad_up_ECF, w3_EFD)
    return (
        _like(torch.bmm(grad_gate_ECF.transpose(1, 2), x_ECD), w1_EFD),
        _like(grad_w2_EDF, w2_EDF),
        _like(torch.bmm(grad_up_ECF.transpose(1, 2), x_ECD), w3_EFD),
        _like(padding.unpad(grad_x_ECD, R), x_RD),
    )


class BatchedMMPadded(KernelBackend):
    """Padded batched products. See the module's text."""

    name = "batched_mm_padded"
    summary = "three torch.bmm over experts padded to the busiest one; drops nothing"
    host_syncs = True
    static_shapes = False
    pads = True


BACKEND = BatchedMMPadded(Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward))
