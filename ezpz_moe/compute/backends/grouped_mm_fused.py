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
from typing import Self

import torch
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.backends.grouped_mm import reasons_against, row_major
from ezpz_moe.compute.contract import offsets_of_counts, offsets_on_device
from ezpz_moe.compute.ffn import kernels_of
from ezpz_moe.compute.grouping import Grouping
from ezpz_moe.compute.layouts import is_transposed, laid_out_like


class _Offsets(Grouping):
    """An operand is the rows themselves, in strides that ``torch._grouped_mm`` reads."""

    def __init__(self, offs_E: Tensor) -> None:
        self.offs_E = offs_E.int()

    @classmethod
    def of_counts(cls, counts_E: Tensor, rows_RX: Tensor) -> Self:
        return cls(offsets_of_counts(counts_E, rows_RX))

    @classmethod
    def of_offsets(cls, offs_E: Tensor, rows_RX: Tensor) -> Self:
        return cls(offsets_on_device(offs_E, rows_RX))

    def zero_tail_(self, rows_RX: Tensor) -> Tensor:
        if self.offs_E.is_cpu:  # here the number of tail rows is known without waiting
            torch.tensor_split(rows_RX, self.offs_E[-1:].long())[1].zero_()
            return rows_RX
        tail_R = torch.arange(rows_RX.shape[0], device=rows_RX.device) >= self.offs_E[-1]
        return rows_RX.masked_fill_(tail_R.unsqueeze(1), 0)

    def operand(self, rows_RX: Tensor) -> Tensor:
        return row_major(rows_RX)

    # torch._grouped_mm cannot write into an output.
    def multiply(self, A: Tensor, B_EKN: Tensor, out_RN: Tensor | None = None) -> Tensor:
        return products.grouped_mm(A, B_EKN, self.offs_E)

    def multiply_sum(
        self, A: Tensor, B_EKN: Tensor, A2: Tensor, B2_ELN: Tensor, out_RN: Tensor | None = None
    ) -> Tensor:
        return products.grouped_mm_sum(A, B_EKN, A2, B2_ELN, self.offs_E)

    def weight_gradient(self, left: Tensor, right: Tensor, like_EMN: Tensor) -> Tensor:
        if is_transposed(like_EMN):
            return self.weight_gradient(right, left, like_EMN.transpose(1, 2)).transpose(1, 2)
        grad_EMN = products.grouped_outer(left, right, self.offs_E, like_EMN.dtype)
        return laid_out_like(grad_EMN, like_EMN)


@dataclass(frozen=True)
class GroupedMMFused(KernelBackend):
    """``torch._grouped_mm`` with its own backward. See the module's text."""

    name = "grouped_mm_fused"
    summary = "torch._grouped_mm as the host calls it, with a backward that keeps less"
    host_syncs = False
    static_shapes = True
    operators = Operators("grouped_mm_fused", kernels_of(_Offsets))

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        return reasons_against(device, dtype, dims)


BACKEND = GroupedMMFused()
