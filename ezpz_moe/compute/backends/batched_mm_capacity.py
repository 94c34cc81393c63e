"""``batched_mm_capacity``: the same number of rows for every expert; rows beyond it are DROPPED.

Every expert computes C = ceil(capacity_factor * R / E) rows, a number that comes from shapes alone:
three ``torch.bmm``, all shapes static, and no token count is ever read on the host. So a CUDA graph
can capture it, and its time does not depend on the routing.

The price: if an expert has more than C tokens, the *last ones in row order* are dropped, always the
same ones. Their output row is exactly zero, and they add nothing to any gradient. In the trainer an
expert's rows are in token order, so late tokens of a batch are dropped first. A run with
``[telemetry]`` reports the share as ``drop_rate``. With ``capacity_factor`` at or above E nothing
can be dropped.

Rows move to their slots and back by index, as a gather in both directions: a rerun gives the same
bits.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. C = rows per expert, S = E * C slots.
"""

from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.contract import offsets_of_counts, offsets_on_device
from ezpz_moe.compute.ffn import kernels_of
from ezpz_moe.compute.grouping import Grouping
from ezpz_moe.compute.layouts import is_transposed


def rows_per_expert(num_rows: int, num_experts: int, capacity_factor: float) -> int:
    """Return C, which is at most all rows; 0 without experts."""
    if not num_experts:
        return 0
    # A factor above E changes nothing. Limiting it first keeps the product finite: ceil(inf)
    # raises.
    return min(ceil(min(capacity_factor, num_experts) * num_rows / num_experts), num_rows)


class _Slots(Grouping):
    """Which row each of the S slots holds, and which slot each of the R rows has.

    An operand is slots. Results are rows; dropped ones count as rows of the tail.
    """

    depends_on_number_of_rows = True

    def __init__(self, ends_E: Tensor, rows_RX: Tensor, capacity_factor: float) -> None:
        """``ends_E``: inclusive cumulative counts, on the rows' device."""
        device, R, E = rows_RX.device, rows_RX.shape[0], ends_E.shape[0]
        self.experts, self.capacity = E, rows_per_expert(R, E, capacity_factor)
        ends_E = ends_E.to(torch.int64)
        starts_E = F.pad(ends_E[:-1], (1, 0))

        place_C = torch.arange(self.capacity, device=device)
        # An expert's rows are neighbours, so its slot c holds row start + c: nothing to sort or
        # scatter.
        row_EC = starts_E.unsqueeze(1) + place_C
        void_EC = row_EC >= ends_E.unsqueeze(1)
        self.void_S1 = void_EC.view(-1, 1)
        # A void slot reads row 0, which is a valid index; operand() then zeroes it.
        self.row_S = row_EC.masked_fill(void_EC, 0).flatten()

        row_R = torch.arange(R, device=device)
        # right=True skips experts without rows, whose end is also the next expert's first row.
        expert_R = torch.searchsorted(ends_E, row_R, right=True).clamp_(max=E - 1)
        place_R = row_R - starts_E[expert_R]
        # Tail rows follow the last expert's own; the clamp gives them to it, so drop them here.
        dropped_R = (place_R >= self.capacity) | (row_R >= ends_E[-1])
        self.dropped_R1 = dropped_R.unsqueeze(1)
        self.slot_R = (expert_R * self.capacity + place_R).masked_fill_(dropped_R, 0)

    @classmethod
    def of_counts(cls, counts_E: Tensor, rows_RX: Tensor, capacity_factor: float) -> Self:
        return cls(offsets_of_counts(counts_E, rows_RX), rows_RX, capacity_factor)

    @classmethod
    def of_offsets(cls, offs_E: Tensor, rows_RX: Tensor, capacity_factor: float) -> Self:
        return cls(offsets_on_device(offs_E, rows_RX), rows_RX, capacity_factor)

    def zero_tail_(self, rows_RX: Tensor) -> Tensor:
        return rows_RX.masked_fill_(self.dropped_R1, 0)

    def operand(self, rows_RX: Tensor) -> Tensor:
        """Gather [R, X] -> [E, C, X]. An empty slot is zero: it adds nothing to a gradient."""
        # Fill, do not multiply by zero: the row that a void slot reads may hold NaN.
        taken_SX = rows_RX.index_select(0, self.row_S).masked_fill_(self.void_S1, 0)
        return taken_SX.view(self.experts, self.capacity, rows_RX.shape[1])

    def multiply(self, A: Tensor, B_EKN: Tensor, out_RN: Tensor | None = None) -> Tensor:
        return self._rows(products.bmm(A, B_EKN))

    def multiply_sum(
        self, A: Tensor, B_EKN: Tensor, A2: Tensor, B2_ELN: Tensor, out_RN: Tensor | None = None
    ) -> Tensor:
        return self._rows(products.bmm_sum(A, B_EKN, A2, B2_ELN))

    def _rows(self, slots_ECX: Tensor) -> Tensor:
        """Gather [E, C, X] -> [R, X]. Dropped and tail rows are those of the first slot."""
        # Rows are kept, not slots: [E, C, F] is capacity_factor times as large.
        return slots_ECX.flatten(0, 1).index_select(0, self.slot_R)

    def weight_gradient(self, left: Tensor, right: Tensor, like_EMN: Tensor) -> Tensor:
        if is_transposed(like_EMN):
            # bmm is slow into a transposed out (see is_transposed): compute the transpose, return
            # a view.
            return self.weight_gradient(right, left, like_EMN.transpose(1, 2)).transpose(1, 2)
        return products.bmm(left.transpose(1, 2), right, torch.empty_like(like_EMN))


@dataclass(frozen=True)
class BatchedMMCapacity(KernelBackend):
    """Batched products of one static size. See the module's text.

    Attributes:
        capacity_factor: rows per expert, as a multiple of the mean over experts R / E.
    """

    name = "batched_mm_capacity"
    summary = "three torch.bmm of static shapes; DROPS tokens beyond a capacity"
    host_syncs = False
    static_shapes = True
    drops_tokens = True
    pads = True
    operators = Operators("batched_mm_capacity", kernels_of(_Slots))

    capacity_factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.25

    @property
    def lossless(self) -> "BatchedMMCapacity":
        return replace(self, capacity_factor=1e6)  # more than the number of experts

    @property
    def kernel_options(self) -> tuple[float]:
        return (self.capacity_factor,)

    def rows_used(self, num_tokens_per_expert_E: Tensor, num_rows: int) -> Tensor:
        E = num_tokens_per_expert_E.shape[0]
        C = rows_per_expert(num_rows, E, self.capacity_factor)
        # Computed on the device, without reading a count; full_like makes the constant there as
        # well.
        dropped = (num_tokens_per_expert_E.to(torch.int64) - C).clamp_(min=0).sum()
        return torch.stack([torch.full_like(dropped, E * C), dropped])


BACKEND = BatchedMMCapacity()
