"""``for_loop``: one matrix product per expert, over the rows that the expert owns.

Runs wherever torch multiplies matrices: Intel XPU, NVIDIA before SM90, ROCm, Ascend, CPU. It costs
one device-to-host copy of the counts per call, and one kernel launch per expert and product.

Indexing the weights with ``w[e]`` under autograd makes the loop quadratic: each ``select`` writes a
full-size zero gradient [E, F, D] and adds it. Here every gradient is one buffer, and each expert's
product writes its own slice of it, once. Elementwise work covers all rows at once.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. n = rows that belong to an expert.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.contract import counts_of_offsets, counts_on_host
from ezpz_moe.compute.ffn import kernels_of
from ezpz_moe.compute.grouping import Grouping


class _Operand:
    """Rows, as one view per expert.

    A single call makes all views, for every product of the same rows: indexing in the loop costs
    as much as launching a small product.
    """

    def __init__(self, rows_RX: Tensor, counts: list[int]) -> None:
        self.rows_RX = rows_RX
        self.counts = counts

    @cached_property
    def rows_nX(self) -> tuple[Tensor, ...]:
        """Every expert's rows; tail rows belong to nobody."""
        return self.rows_RX[: sum(self.counts)].split(self.counts)

    @cached_property
    def columns_Xn(self) -> tuple[Tensor, ...]:
        """Every expert's rows, transposed."""
        return self.rows_RX[: sum(self.counts)].T.split(self.counts, dim=1)


class _Loop(Grouping):
    def __init__(self, counts: list[int]) -> None:
        self.counts = counts
        self.n = sum(counts)

    @classmethod
    def of_counts(cls, counts_E: Tensor, rows_RX: Tensor) -> Self:
        return cls(counts_on_host(counts_E, rows_RX.shape[0]))

    @classmethod
    def of_offsets(cls, offs_E: Tensor, rows_RX: Tensor) -> Self:
        return cls(counts_of_offsets(offs_E, rows_RX.shape[0]))

    def owned(self, rows_RX: Tensor) -> Tensor:
        return rows_RX[: self.n]

    def zero_tail_(self, rows_RX: Tensor) -> Tensor:
        rows_RX[self.n :].zero_()
        return rows_RX

    def operand(self, rows_RX: Tensor) -> _Operand:
        return _Operand(rows_RX, self.counts)

    def multiply(self, A: _Operand, B_EKN: Tensor, out_RN: Tensor | None = None) -> Tensor:
        out = self.operand(_rows_for(A, B_EKN) if out_RN is None else out_RN)
        for A_nK, B_KN, out_nN in zip(A.rows_nX, B_EKN.unbind(), out.rows_nX, strict=True):
            # An expert without rows writes nothing: skip its launch.
            if len(A_nK):
                products.mm(A_nK, B_KN, out_nN)
        return out.rows_RX

    def multiply_sum(
        self,
        A: _Operand,
        B_EKN: Tensor,
        A2: _Operand,
        B2_ELN: Tensor,
        out_RN: Tensor | None = None,
    ) -> Tensor:
        out = self.operand(_rows_for(A, B_EKN) if out_RN is None else out_RN)
        pairs = zip(A.rows_nX, B_EKN.unbind(), A2.rows_nX, B2_ELN.unbind(), strict=True)
        for pair, out_nN in zip(pairs, out.rows_nX, strict=True):
            if len(out_nN):
                products.mm_sum(*pair, out_nN)
        return out.rows_RX

    def weight_gradient(self, left: _Operand, right: _Operand, like_EMN: Tensor) -> Tensor:
        # empty, not zeros: every slice is written once, also that of an idle expert.
        grad_EMN = torch.empty_like(like_EMN)
        for left_Mn, right_nN, grad_MN in zip(
            left.columns_Xn, right.rows_nX, grad_EMN.unbind(), strict=True
        ):
            products.mm(left_Mn, right_nN, grad_MN)
        return grad_EMN


def _rows_for(A: _Operand, B_EKN: Tensor) -> Tensor:
    return A.rows_RX.new_empty(A.rows_RX.shape[0], B_EKN.shape[2])


@dataclass(frozen=True)
class ForLoop(KernelBackend):
    """One product per expert. See the module's text."""

    name = "for_loop"
    summary = "one torch.mm per expert; runs on every device"
    host_syncs = True
    static_shapes = False
    operators = Operators("for_loop", kernels_of(_Loop))


BACKEND = ForLoop()
