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
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from ezpz_moe.compute import products
from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.contract import counts_of_offsets, counts_on_host
from ezpz_moe.compute.ffn import kernels_of
from ezpz_moe.compute.grouping import Grouping
from ezpz_moe.compute.layouts import is_transposed
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


class _Operand:
    """Rows sorted by expert [R, X], with room for a padded copy of those in uneven runs [P, X]."""

    def __init__(self, rows_RX: Tensor, plan: _Plan) -> None:
        self.rows_RX = rows_RX
        self.plan = plan
        self.padded_PX = rows_RX.new_empty(plan.P, rows_RX.shape[1])

    def read(self) -> Self:
        """Prepare for reading: padding is zero, which adds nothing to a gradient."""
        if self.plan.P:
            # Gather every slot, then zero the padding: one pass instead of zeroing the buffer and
            # scattering into it.
            torch.index_select(self.rows_RX, 0, self.plan.source_P, out=self.padded_PX)
            self.padded_PX.index_fill_(0, self.plan.void_v, 0)
        return self

    def of(self, run: Run) -> Tensor:
        """Return a run's rows as a view [g, C, X]."""
        slot = self.plan.slot_of.get(run)
        if slot is None:
            rows_X = self.rows_RX[run.start : run.end]
        else:
            # An even run needs no slot: its rows already lie as [g, C, X].
            rows_X = self.padded_PX[slot : slot + run.experts * run.capacity]
        return rows_X.unflatten(0, (run.experts, run.capacity))

    def written(self) -> Tensor:
        """Return [R, X] with everything that was written to the runs."""
        if self.plan.P:
            # Padded rows were multiplied too. Their results stay behind.
            written_pX = self.padded_PX.index_select(0, self.plan.slots_p)
            self.rows_RX.index_copy_(0, self.plan.rows_p, written_pX)
        return self.rows_RX


def _product(A_gCK: Tensor, B_gKN: Tensor, out_gCN: Tensor) -> None:
    if A_gCK.shape[0] == 1:  # some libraries have better kernels for a single matrix
        products.mm(A_gCK[0], B_gKN[0], out_gCN[0])
    else:
        products.bmm(A_gCK, B_gKN, out_gCN)


class _Runs(Grouping):
    def __init__(self, plan: _Plan) -> None:
        self.plan = plan

    @classmethod
    def of_counts(cls, counts_E: Tensor, rows_RX: Tensor, max_padding: float) -> Self:
        counts = counts_on_host(counts_E, rows_RX.shape[0])
        return cls(_Plan(counts, rows_RX.device, max_padding))

    @classmethod
    def of_offsets(cls, offs_E: Tensor, rows_RX: Tensor, max_padding: float) -> Self:
        counts = counts_of_offsets(offs_E, rows_RX.shape[0])
        return cls(_Plan(counts, rows_RX.device, max_padding))

    def owned(self, rows_RX: Tensor) -> Tensor:
        return rows_RX[: self.plan.n]

    def zero_tail_(self, rows_RX: Tensor) -> Tensor:
        rows_RX[self.plan.n :].zero_()
        return rows_RX

    def operand(self, rows_RX: Tensor) -> _Operand:
        return _Operand(rows_RX, self.plan).read()

    def multiply(self, A: _Operand, B_EKN: Tensor, out_RN: Tensor | None = None) -> Tensor:
        out = self._to_write(A, B_EKN, out_RN)
        for run in self.plan.runs:
            _product(A.of(run), B_EKN[run.first : run.stop], out.of(run))
        return out.written()

    def multiply_sum(
        self,
        A: _Operand,
        B_EKN: Tensor,
        A2: _Operand,
        B2_ELN: Tensor,
        out_RN: Tensor | None = None,
    ) -> Tensor:
        out = self._to_write(A, B_EKN, out_RN)
        for run in self.plan.runs:
            of_run = slice(run.first, run.stop)
            products.bmm_sum(A.of(run), B_EKN[of_run], A2.of(run), B2_ELN[of_run], out.of(run))
        return out.written()

    def _to_write(self, A: _Operand, B_EKN: Tensor, out_RN: Tensor | None) -> _Operand:
        if out_RN is None:
            out_RN = A.rows_RX.new_empty(A.rows_RX.shape[0], B_EKN.shape[2])
        return _Operand(out_RN, self.plan)

    def weight_gradient(self, left: _Operand, right: _Operand, like_EMN: Tensor) -> Tensor:
        if is_transposed(like_EMN):
            # bmm is slow into a transposed out (see is_transposed): compute the transpose, return
            # a view.
            return self.weight_gradient(right, left, like_EMN.transpose(1, 2)).transpose(1, 2)
        grad_EMN = torch.empty_like(like_EMN)
        for idle in self.plan.idle:
            grad_EMN[idle].zero_()
        for run in self.plan.runs:
            left_gMC = left.of(run).transpose(1, 2)
            _product(left_gMC, right.of(run), grad_EMN[run.first : run.stop])
        return grad_EMN


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
    operators = Operators("batched_mm_padded", kernels_of(_Runs))

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
