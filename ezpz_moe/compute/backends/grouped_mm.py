"""``grouped_mm``: ``torch._grouped_mm``, the product that torchtitan itself uses.

Inside the trainer ``compute_backend = "grouped_mm"`` is the host's own path, untouched and bit for
bit. This file is the same product under the contract: ``torch._grouped_mm`` leaves tail rows
unwritten, so they are masked here, before and after it, without a device sync.

Fast on NVIDIA SM90 and newer; on older GPUs torch loops over the experts with host syncs; Intel XPU
does not have it.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.arguments import Biases
from ezpz_moe.compute.contract import (
    Backend,
    check_where_free,
    counts_of_offsets,
    counts_on_host,
)
from ezpz_moe.compute.products import ALIGNMENT_BYTES, aligned


@cache
def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what ``torch._grouped_mm`` answers to a tiny product, or None if it computes it."""
    # Ask by computing: which devices and dtypes work changes from one torch release to the next.
    A_RK = torch.ones(16, 16, device=device, dtype=dtype)
    B_EKN = torch.ones(2, 16, 16, device=device, dtype=dtype).transpose(1, 2)
    offs_E = torch.tensor([8, 16], device=device, dtype=torch.int32)
    try:
        # item() waits, so an asynchronous failure shows here and not in training.
        torch._grouped_mm(A_RK, B_EKN, offs=offs_E).sum().item()
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
    return None


def reasons_against(device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
    """Return every reason why ``torch._grouped_mm`` cannot compute this."""
    reasons = []
    if device.type != "meta" and (refusal := _refusal(device, dtype)) is not None:
        reasons.append(
            f"torch._grouped_mm of torch {torch.__version__} refuses {dtype} on {device.type} "
            f"({refusal}): use for_loop or batched_mm_padded"
        )
    reasons += [
        f"torch._grouped_mm needs dimensions that are multiples of {ALIGNMENT_BYTES} bytes, "
        f"but {dim} x {dtype} is not: pad the dimension, or use for_loop or batched_mm_padded"
        # D and F may be equal: say it once.
        for dim in dict.fromkeys(dims)
        if dim * dtype.itemsize % ALIGNMENT_BYTES
    ]
    return reasons


class GroupedMM(Backend):
    """``torch._grouped_mm`` under the contract. See the module's text."""

    name = "grouped_mm"
    summary = "torch._grouped_mm; in the trainer the host's own path, bit for bit"
    host_syncs = False
    static_shapes = True

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        return reasons_against(device, dtype, dims)

    def _grouped_mm(self, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
        check_where_free(counts_of_offsets, offs_E, A_RK)
        # torch._grouped_mm takes int32 offsets only.
        offs_E = offs_E.to(A_RK.device, torch.int32)
        owned_R1 = (torch.arange(A_RK.shape[0], device=A_RK.device) < offs_E[-1]).unsqueeze(1)
        # Masking A clears the tail of A's gradient in backward; masking C clears C's tail now and
        # that of its gradient later. torch._grouped_mm leaves all of these rows unwritten.
        C_RN = torch._grouped_mm(_OwnedRows.apply(A_RK, owned_R1), aligned(B_EKN), offs=offs_E)
        return _OwnedRows.apply(C_RN, owned_R1)

    def _ffn(
        self,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        w3_EFD: Tensor | None,
        x_RD: Tensor,
        num_tokens_per_expert_E: Tensor,
        activation: str,
        biases: Biases | None,
        trained_E: Tensor | None = None,
    ) -> Tensor:
        counts_E = num_tokens_per_expert_E
        check_where_free(counts_on_host, counts_E, x_RD)
        last = (activation, biases, trained_E)
        return super()._ffn(w1_EFD, w2_EDF, w3_EFD, x_RD, counts_E, *last)


class _OwnedRows(torch.autograd.Function):
    """The rows that an expert owns, with tail rows zero. Contiguous, in forward and in backward.

    ``torch._grouped_mm`` accepts rows of few layouts only, and the incoming gradient may have any.
    A mask is its own adjoint: backward is the same as forward, so second derivatives are right too.
    """

    @staticmethod
    def forward(ctx: Any, rows_RX: Tensor, owned_R1: Tensor) -> Tensor:
        ctx.save_for_backward(owned_R1)
        # where, not a product with the mask: NaN * 0 is NaN.
        return row_major(torch.where(owned_R1, rows_RX, 0))

    @staticmethod
    def backward(ctx: Any, grad_RX: Tensor) -> tuple[Tensor, None]:
        (owned_R1,) = ctx.saved_tensors
        return _OwnedRows.apply(grad_RX, owned_R1), None


def row_major(rows_RX: Tensor) -> Tensor:
    """Return the rows with the strides of a new tensor, copied only if they have others.

    ``contiguous()`` keeps any strides of one row or none, but ``torch._grouped_mm`` refuses them.
    """
    if rows_RX.stride() == (rows_RX.shape[1], 1):
        return rows_RX
    return rows_RX.clone(memory_format=torch.contiguous_format)


BACKEND = GroupedMM()
