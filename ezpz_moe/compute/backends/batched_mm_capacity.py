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
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.contract import (
    is_transposed,
    laid_out_like,
    offsets_of_counts,
    offsets_on_device,
)
from ezpz_moe.compute.elementwise import swiglu_gradients_


def rows_per_expert(num_rows: int, num_experts: int, capacity_factor: float) -> int:
    """Return C, which is at most all rows; 0 without experts."""
    if not num_experts:
        return 0
    # A factor above E changes nothing. Limiting it first keeps the product finite: ceil(inf)
    # raises.
    return min(ceil(min(capacity_factor, num_experts) * num_rows / num_experts), num_rows)


class _Slots:
    """Which row each of the S slots holds, and which slot each of the R rows has."""

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
        # A void slot reads row 0, which is a valid index; take() then zeroes it.
        self.row_S = row_EC.masked_fill(void_EC, 0).flatten()

        row_R = torch.arange(R, device=device)
        # right=True skips experts without rows, whose end is also the next expert's first row.
        expert_R = torch.searchsorted(ends_E, row_R, right=True).clamp_(max=E - 1)
        place_R = row_R - starts_E[expert_R]
        # Tail rows follow the last expert's own; the clamp gives them to it, so drop them here.
        dropped_R = (place_R >= self.capacity) | (row_R >= ends_E[-1])
        self.dropped_R1 = dropped_R.unsqueeze(1)
        self.slot_R = (expert_R * self.capacity + place_R).masked_fill_(dropped_R, 0)

    def take(self, rows_RX: Tensor) -> Tensor:
        """Gather [R, X] -> [E, C, X]. An empty slot is zero: it adds nothing to a gradient."""
        # Fill, do not multiply by zero: the row that a void slot reads may hold NaN.
        taken_SX = rows_RX.index_select(0, self.row_S).masked_fill_(self.void_S1, 0)
        return taken_SX.view(self.experts, self.capacity, rows_RX.shape[1])

    def put(self, slots_ECX: Tensor, like_RX: Tensor | None = None) -> Tensor:
        """Gather [E, C, X] -> [R, X], laid out like ``like_RX``. Dropped and tail rows are zero."""
        rows_RX = slots_ECX.flatten(0, 1).index_select(0, self.slot_R)
        rows_RX.masked_fill_(self.dropped_R1, 0)
        return rows_RX if like_RX is None else laid_out_like(rows_RX, like_RX)

    def clear_(self, slots_ECX: Tensor) -> Tensor:
        """Zero the empty slots: there a product is NaN for an idle expert whose weights are."""
        slots_ECX.flatten(0, 1).masked_fill_(self.void_S1, 0)
        return slots_ECX


def _weight_gradient(left_ECM: Tensor, right_ECN: Tensor, like_EMN: Tensor) -> Tensor:
    """Return ``left.T @ right``, laid out like ``like_EMN``."""
    if is_transposed(like_EMN):
        # bmm is slow into a transposed out (see is_transposed): compute the transpose, return a
        # view.
        return _weight_gradient(right_ECN, left_ECM, like_EMN.transpose(1, 2)).transpose(1, 2)
    return products.bmm(left_ECM.transpose(1, 2), right_ECN, torch.empty_like(like_EMN))


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, capacity_factor: float) -> Tensor:
    slots = _Slots(offsets_on_device(offs_E, A_RK), A_RK, capacity_factor)
    return slots.put(products.bmm(slots.take(A_RK), B_EKN))


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, capacity_factor: float
) -> tuple[Tensor, Tensor]:
    slots = _Slots(offsets_on_device(offs_E, A_RK), A_RK, capacity_factor)
    grad_C_ECN = slots.take(grad_C_RN)
    grad_A_ECK = products.bmm(grad_C_ECN, B_EKN.transpose(1, 2))
    return slots.put(grad_A_ECK, A_RK), _weight_gradient(slots.take(A_RK), grad_C_ECN, B_EKN)


def _gate_and_up(w1_EFD: Tensor, w3_EFD: Tensor, x_ECD: Tensor) -> tuple[Tensor, Tensor]:
    gate_ECF = products.bmm(x_ECD, w1_EFD.transpose(1, 2))
    return gate_ECF, products.bmm(x_ECD, w3_EFD.transpose(1, 2))


def _swiglu(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    capacity_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    slots = _Slots(offsets_of_counts(num_tokens_per_expert_E, x_RD), x_RD, capacity_factor)
    gate_ECF, up_ECF = _gate_and_up(w1_EFD, w3_EFD, slots.take(x_RD))
    y_ECD = products.bmm(F.silu(gate_ECF).mul_(up_ECF), w2_EDF.transpose(1, 2))
    # Keep rows, not slots: [E, C, F] is capacity_factor times as large.
    return slots.put(y_ECD), slots.put(gate_ECF), slots.put(up_ECF)


def _swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    capacity_factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = _Slots(offsets_of_counts(num_tokens_per_expert_E, x_RD), x_RD, capacity_factor)
    x_ECD, grad_y_ECD = slots.take(x_RD), slots.take(grad_y_RD)
    if gate_RF is None or up_RF is None:
        gate_ECF, up_ECF = map(slots.clear_, _gate_and_up(w1_EFD, w3_EFD, x_ECD))
    else:
        gate_ECF, up_ECF = slots.take(gate_RF), slots.take(up_RF)
    activated_ECF = F.silu(gate_ECF)
    hidden_ECF = activated_ECF * up_ECF
    # w2's gradient first: what follows overwrites hidden and activated.
    grad_w2_EDF = _weight_gradient(grad_y_ECD, hidden_ECF, w2_EDF)

    grad_hidden_ECF = slots.clear_(products.bmm(grad_y_ECD, w2_EDF, hidden_ECF))
    grad_gate_ECF, grad_up_ECF = swiglu_gradients_(grad_hidden_ECF, activated_ECF, gate_ECF, up_ECF)
    grad_x_ECD = products.bmm_sum(grad_gate_ECF, w1_EFD, grad_up_ECF, w3_EFD)
    return (
        _weight_gradient(grad_gate_ECF, x_ECD, w1_EFD),
        grad_w2_EDF,
        _weight_gradient(grad_up_ECF, x_ECD, w3_EFD),
        slots.put(grad_x_ECD, x_RD),
    )


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
    operators = Operators(
        "batched_mm_capacity", Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward)
    )

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
