"""``batched_mm_padded``: few ``torch.bmm``, each over neighbouring experts padded to one length.

It makes few large launches instead of one per expert, which suits many small experts. It drops
nothing: the lengths come from the counts, at the price of one device-to-host copy per pass.

A single launch for all experts would compute as many rows for each as the busiest one has: under
skew almost all of them are padding. So the experts are cut into runs of neighbours, each with a
length of its own (:mod:`ezpz_moe.compute.runs`), and as few runs as keep the padding of all
together below ``max_padding`` times the rows. They are neighbours because ``torch.bmm`` can read a
slice of the weights in place, but any other selection of experts only as a copy. A busy expert
stays alone; experts without rows cost no launch unless they lie between two that share one.

If the experts of a run are equally busy, their rows already lie as the product wants them: they are
read and written in place. Only rows of uneven runs are copied, into one buffer for all such runs.
Between the products everything is unpadded [R, F]: elementwise work covers all rows at once, and
the memory held between forward and backward does not grow with skew.

Another way to few launches was measured and is slower: a base layer with the same length for all
experts, and the remaining rows of each busier one alone, added to its weight gradients. With 25 %
padding it has as many launches as runs have when busy and idle experts alternate, four times as
many when the experts are sorted by load, and it copies rows of every expert.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. g = experts of a run, C = rows computed
for each of them, P = padded rows of all uneven runs, n = rows that belong to an expert.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.contract import (
    counts_of_offsets,
    counts_on_host,
    is_transposed,
    laid_out_like,
)
from ezpz_moe.compute.elementwise import swiglu_gradients_
from ezpz_moe.compute.runs import Run, runs_within


class _Plan:
    """The runs, and where the rows of uneven ones are in a padded buffer.

    Attributes:
        runs: cover every expert that has rows.
        idle: slices of experts that are in no run.
        n: rows that belong to an expert.
        slot_of: run -> its first row in the padded buffer, for uneven runs.
        P: rows of the padded buffer.
        rows_p, slots_p: for each row in an uneven run, its index among all rows and in the buffer.
        source_P: the row that each row of the buffer holds; an arbitrary row for padding.
        void_v: the rows of the buffer that are padding.
    """

    def __init__(self, counts: list[int], device: torch.device, max_padding: float) -> None:
        self.runs = runs_within(tuple(counts), max_padding)
        ends = [0, *(run.stop for run in self.runs)]
        begins = [*(run.first for run in self.runs), len(counts)]
        # Gaps between runs, and at both ends. Their weight gradients must be zeroed, since no
        # product writes them.
        self.idle = [slice(end, begin) for end, begin in zip(ends, begins, strict=True)]
        self.n = sum(counts)
        self.P, self.slot_of = 0, {}
        cells: list[tuple[int, int, int, int]] = []  # per expert: row, count, slot, padding
        for run in self.runs:
            if run.padding:
                self.slot_of[run] = self.P
                row = run.start
                for count in counts[run.first : run.stop]:
                    cells.append((row, count, self.P, run.capacity - count))
                    row += count
                    self.P += run.capacity
        if self.P:
            self._index(cells, device)

    def _index(self, cells: list[tuple[int, int, int, int]], device: torch.device) -> None:
        # non_blocking, because torch.tensor(..., device=device) would wait for the device again
        of_cells = torch.tensor(cells, dtype=torch.int64).to(device, non_blocking=True)
        row_c, count_c, slot_c, padding_c = of_cells.unbind(1)
        padding = sum(cell[-1] for cell in cells)
        self.rows_p = _ranges(row_c, count_c, self.P - padding)
        self.slots_p = _ranges(slot_c, count_c, self.P - padding)
        self.void_v = _ranges(slot_c + count_c, padding_c, padding)
        self.source_P = self.rows_p.new_zeros(self.P).index_copy_(0, self.slots_p, self.rows_p)


def _ranges(start_c: Tensor, length_c: Tensor, total: int) -> Tensor:
    """Return ``start, ..., start + length - 1`` of all cells as one tensor of ``total`` numbers."""
    # Each number is its own index in the result plus a shift that is constant within its cell.
    shift_c = start_c - (torch.cumsum(length_c, 0) - length_c)
    # output_size is known here. Without it torch would wait for the device to learn it.
    shift_t = torch.repeat_interleave(shift_c, length_c, output_size=total)
    return torch.arange(total, device=start_c.device) + shift_t


class _Rows:
    """Rows sorted by expert [R, X], with room for a padded copy of those in uneven runs [P, X]."""

    def __init__(self, rows_RX: Tensor, plan: _Plan) -> None:
        self.rows_RX = rows_RX
        self.plan = plan
        self.padded_PX = rows_RX.new_empty(plan.P, rows_RX.shape[1])

    @classmethod
    def padded(cls, rows_RX: Tensor, plan: _Plan) -> "_Rows":
        """Prepare for reading: padding is zero, which adds nothing to a gradient."""
        rows = cls(rows_RX, plan)
        if plan.P:
            # Gather every slot, then zero the padding: one pass instead of zeroing the buffer and
            # scattering into it.
            torch.index_select(rows_RX, 0, plan.source_P, out=rows.padded_PX)
            rows.padded_PX.index_fill_(0, plan.void_v, 0)
        return rows

    def of(self, run: Run) -> Tensor:
        """Return a run's rows as a view [g, C, X]."""
        slot = self.plan.slot_of.get(run)
        if slot is None:
            rows_X = self.rows_RX[run.start : run.end]
        else:
            # An even run needs no slot: its rows already lie as [g, C, X].
            rows_X = self.padded_PX[slot : slot + run.experts * run.capacity]
        return rows_X.unflatten(0, (run.experts, run.capacity))

    def unpadded(self) -> Tensor:
        """Return [R, X] with everything that was written to the runs; tail rows are zero."""
        if self.plan.P:
            written_pX = self.padded_PX.index_select(0, self.plan.slots_p)
            self.rows_RX.index_copy_(0, self.plan.rows_p, written_pX)
        self.rows_RX[self.plan.n :].zero_()
        return self.rows_RX


def _product(A_gCK: Tensor, B_gKN: Tensor, out_gCN: Tensor) -> None:
    if A_gCK.shape[0] == 1:  # some libraries have better kernels for a single matrix
        products.mm(A_gCK[0], B_gKN[0], out_gCN[0])
    else:
        products.bmm(A_gCK, B_gKN, out_gCN)


# Padded rows are multiplied too, and their results left behind: unpadded() copies only real ones.
def _multiply(A: _Rows, B_EKN: Tensor, out: _Rows) -> None:
    for run in A.plan.runs:
        _product(A.of(run), B_EKN[run.first : run.stop], out.of(run))


def _multiply_sum(A: _Rows, B_EKN: Tensor, A2: _Rows, B2_ELN: Tensor, out: _Rows) -> None:
    for run in A.plan.runs:
        experts = slice(run.first, run.stop)
        products.bmm_sum(*(A.of(run), B_EKN[experts]), *(A2.of(run), B2_ELN[experts]), out.of(run))


def _weight_gradient(left: _Rows, right: _Rows, like_EMN: Tensor) -> Tensor:
    """Compute ``left.T @ right`` for every expert, laid out like ``like_EMN``."""
    if is_transposed(like_EMN):
        # bmm is slow into a transposed out (see is_transposed): compute the transpose, return a
        # view.
        return _weight_gradient(right, left, like_EMN.transpose(1, 2)).transpose(1, 2)
    grad_EMN = torch.empty_like(like_EMN)
    for idle in left.plan.idle:
        grad_EMN[idle].zero_()
    for run in left.plan.runs:
        _product(left.of(run).transpose(1, 2), right.of(run), grad_EMN[run.first : run.stop])
    return grad_EMN


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor, max_padding: float) -> Tensor:
    counts = counts_of_offsets(offs_E, A_RK.shape[0])
    plan = _Plan(counts, A_RK.device, max_padding)
    C = _Rows(A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2]), plan)
    _multiply(_Rows.padded(A_RK, plan), B_EKN, C)
    return C.unpadded()


def _mm_backward(
    grad_C_RN: Tensor,
    A_RK: Tensor,
    B_EKN: Tensor,
    offs_E: Tensor,
    max_padding: float,
) -> tuple[Tensor, Tensor]:
    counts = counts_of_offsets(offs_E, A_RK.shape[0])
    plan = _Plan(counts, A_RK.device, max_padding)
    grad_C, grad_A = _Rows.padded(grad_C_RN, plan), _Rows(A_RK.new_empty(A_RK.shape), plan)
    _multiply(grad_C, B_EKN.transpose(1, 2), grad_A)
    grad_B_EKN = _weight_gradient(_Rows.padded(A_RK, plan), grad_C, B_EKN)
    return laid_out_like(grad_A.unpadded(), A_RK), grad_B_EKN


def _gate_and_up(w1_EFD: Tensor, w3_EFD: Tensor, x: _Rows) -> tuple[Tensor, Tensor]:
    R, F_ = x.rows_RX.shape[0], w1_EFD.shape[1]
    gate, up = (_Rows(x.rows_RX.new_empty(R, F_), x.plan) for _ in range(2))
    _multiply(x, w1_EFD.transpose(1, 2), gate)
    _multiply(x, w3_EFD.transpose(1, 2), up)
    return gate.unpadded(), up.unpadded()


def _swiglu(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    max_padding: float,
) -> tuple[Tensor, Tensor, Tensor]:
    counts = counts_on_host(num_tokens_per_expert_E, x_RD.shape[0])
    plan = _Plan(counts, x_RD.device, max_padding)
    gate_RF, up_RF = _gate_and_up(w1_EFD, w3_EFD, _Rows.padded(x_RD, plan))
    hidden = _Rows.padded(F.silu(gate_RF).mul_(up_RF), plan)
    y = _Rows(x_RD.new_empty(x_RD.shape), plan)
    _multiply(hidden, w2_EDF.transpose(1, 2), y)
    return y.unpadded(), gate_RF, up_RF


def _swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    max_padding: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = counts_on_host(num_tokens_per_expert_E, x_RD.shape[0])
    plan = _Plan(counts, x_RD.device, max_padding)
    x, grad_y = _Rows.padded(x_RD, plan), _Rows.padded(grad_y_RD, plan)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(w1_EFD, w3_EFD, x)
    # Two [R, F] buffers besides the padded copies: fresh memory costs an allocator the most.
    activated_RF = F.silu(gate_RF)
    hidden_RF = activated_RF * up_RF
    grad_w2_EDF = _weight_gradient(grad_y, _Rows.padded(hidden_RF, plan), w2_EDF)

    # hidden is no longer needed: its gradient takes over the memory.
    grad_hidden = _Rows(hidden_RF, plan)
    _multiply(grad_y, w2_EDF, grad_hidden)
    gradients = swiglu_gradients_(grad_hidden.unpadded(), activated_RF, gate_RF, up_RF)
    grad_gate, grad_up = (_Rows.padded(each, plan) for each in gradients)

    grad_x = _Rows(x_RD.new_empty(x_RD.shape), plan)
    _multiply_sum(grad_gate, w1_EFD, grad_up, w3_EFD, grad_x)
    return (
        _weight_gradient(grad_gate, x, w1_EFD),
        grad_w2_EDF,
        _weight_gradient(grad_up, x, w3_EFD),
        laid_out_like(grad_x.unpadded(), x_RD),
    )


@dataclass(frozen=True)
class BatchedMMPadded(KernelBackend):
    """Padded batched products. See the module's text.

    Attributes:
        max_padding: most padding rows of all experts together, as a share of the rows.
    """

    name = "batched_mm_padded"
    summary = "torch.bmm over runs of experts padded to one length; drops nothing"
    host_syncs = True
    static_shapes = False
    pads = True
    operators = Operators(
        "batched_mm_padded", Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward)
    )

    max_padding: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.25

    @property
    def kernel_options(self) -> tuple[float]:
        return (self.max_padding,)

    # The runs are forward's, from the cache of runs_within: only copying the counts costs time.
    def rows_used(self, num_tokens_per_expert_E: Tensor, num_rows: int) -> Tensor:
        counts = counts_on_host(num_tokens_per_expert_E, num_rows)
        runs = runs_within(tuple(counts), self.max_padding)
        computed = sum(counts) + sum(run.padding for run in runs)
        return torch.tensor([computed, 0])


BACKEND = BatchedMMPadded()
