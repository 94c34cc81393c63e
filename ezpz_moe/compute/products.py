"""Matrix products for the backends built from torch's own: mm, bmm and the grouped mm.

All compute in the dtype of their first operand. Weights in another dtype are cast for the product
that reads them, and a result may be of another: it is rounded on its way there. If the dtype is
emulated (:mod:`.native`) they multiply in float32 and round each result once. On a CPU both happen
expert by expert, or a few experts at a time: a copy of so few stays in the cache, and of a whole
weight stack there is none. Otherwise they are torch's functions unchanged.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. n = rows that belong to an expert;
g = experts of a batched product, C = rows that each of them has.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ezpz_moe.compute.native import HALVES, is_emulated

ALIGNMENT_BYTES = 16
"""Every stride that ``torch._grouped_mm`` reads has to be a multiple of it."""
_ELEMENTS_AT_ONCE = 2**19
"""Operands and result of a batched product in float32: at most 2 MiB, or one expert's."""


def mm(A_nK: Tensor, B_KN: Tensor, out_nN: Tensor) -> None:
    """Compute ``out = A @ B``."""
    if out_nN.dtype != A_nK.dtype or _is_emulated(A_nK):
        out_nN.copy_(torch.mm(_read(A_nK, A_nK), _read(B_KN, A_nK)))
    else:
        torch.mm(A_nK, B_KN.to(A_nK.dtype), out=out_nN)


def mm_sum(A_nK: Tensor, B_KN: Tensor, A2_nL: Tensor, B2_LN: Tensor, out_nN: Tensor) -> None:
    """Compute ``out = A @ B + A2 @ B2``."""
    if _is_emulated(A_nK):
        # Add in float32 too: rounding the first product would be a second rounding.
        first_nN = torch.mm(A_nK.float(), _read(B_KN, A_nK))
        out_nN.copy_(first_nN.addmm_(A2_nL.float(), _read(B2_LN, A_nK)))
    else:
        torch.mm(A_nK, B_KN.to(A_nK.dtype), out=out_nN)
        out_nN.addmm_(A2_nL, B2_LN.to(A_nK.dtype))


def bmm(A_gCK: Tensor, B_gKN: Tensor, out_gCN: Tensor | None = None) -> Tensor:
    """Compute ``out[i] = A[i] @ B[i]``. Returns ``out``, a new tensor if none is given."""
    if out_gCN is None:
        out_gCN = _new(A_gCK, B_gKN)
    if _is_plain(A_gCK, B_gKN, out_gCN):
        torch.bmm(A_gCK, B_gKN, out=out_gCN)
    else:
        for A, B, out in _few_at_once(A_gCK, B_gKN, out_gCN):
            out.copy_(torch.bmm(_read(A, A), _read(B, A)))
    return out_gCN


def bmm_sum(
    A_gCK: Tensor, B_gKN: Tensor, A2_gCL: Tensor, B2_gLN: Tensor, out_gCN: Tensor | None = None
) -> Tensor:
    """Compute ``out[i] = A[i] @ B[i] + A2[i] @ B2[i]``. Returns ``out``, new if none is given."""
    if out_gCN is None:
        out_gCN = _new(A_gCK, B_gKN)
    if _is_plain(A_gCK, B_gKN, out_gCN):
        torch.bmm(A_gCK, B_gKN, out=out_gCN)
        out_gCN.baddbmm_(A2_gCL, B2_gLN)
    else:
        for A, B, A2, B2, out in _few_at_once(A_gCK, B_gKN, A2_gCL, B2_gLN, out_gCN):
            first = torch.bmm(_read(A, A), _read(B, A))
            out.copy_(first.baddbmm_(_read(A2, A), _read(B2, A)))
    return out_gCN


def grouped_mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    """Compute ``A[r] @ B[expert of r]`` like ``torch._grouped_mm``; tail rows are unwritten."""
    if not _goes_one_by_one(A_RK, B_EKN):
        return torch._grouped_mm(A_RK, aligned(B_EKN.to(A_RK.dtype)), offs=offs_E)
    C_RN = A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2])
    for rows, B_KN in zip(_rows_of_experts(offs_E), B_EKN.unbind(), strict=True):
        mm(A_RK[rows], B_KN, C_RN[rows])
    return C_RN


def grouped_mm_sum(
    A_RK: Tensor, B_EKN: Tensor, A2_RL: Tensor, B2_ELN: Tensor, offs_E: Tensor
) -> Tensor:
    """Compute ``grouped_mm(A, B) + grouped_mm(A2, B2)``; tail rows are unwritten."""
    if not _is_emulated(A_RK):
        # torch._grouped_mm cannot add to an output. The sum of two rounded products is what the
        # host's autograd computes as well.
        return grouped_mm(A_RK, B_EKN, offs_E).add_(grouped_mm(A2_RL, B2_ELN, offs_E))
    C_RN = A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2])
    experts = zip(_rows_of_experts(offs_E), B_EKN.unbind(), B2_ELN.unbind(), strict=True)
    for rows, B_KN, B2_LN in experts:
        mm_sum(A_RK[rows], B_KN, A2_RL[rows], B2_LN, C_RN[rows])
    return C_RN


def grouped_outer(left_RM: Tensor, right_RN: Tensor, offs_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``left[rows].T @ right[rows]`` per expert: [E, M, N], zero for one without rows.

    On a device the result is in the dtype of the rows, elsewhere in ``dtype``.
    """
    grad_EMN = left_RM.new_empty(offs_E.shape[0], left_RM.shape[1], right_RN.shape[1], dtype=dtype)
    if not _goes_one_by_one(left_RM, grad_EMN):
        # With two 2-D operands torch groups the inner dimension: the offsets cut the sum, not the
        # rows.
        return torch._grouped_mm(left_RM.T, right_RN, offs=offs_E)
    for rows, grad_MN in zip(_rows_of_experts(offs_E), grad_EMN.unbind(), strict=True):
        # Experts without rows are not skipped: a product without terms writes zeros into new
        # memory.
        mm(left_RM[rows].T, right_RN[rows], grad_MN)
    return grad_EMN


def aligned(matrices: Tensor) -> Tensor:
    """Return the same matrices, copied only if ``torch._grouped_mm`` cannot read their strides."""
    strides = matrices.stride()[-2:]
    if min(strides) == 1 and max(strides) * matrices.itemsize % ALIGNMENT_BYTES == 0:
        return matrices
    return matrices.contiguous()


def _goes_one_by_one(A_RK: Tensor, other_EXY: Tensor) -> bool:
    """Return whether experts are multiplied one by one, to cast or round one matrix at a time."""
    return A_RK.is_cpu and (_is_emulated(A_RK) or other_EXY.dtype != A_RK.dtype)


def _is_plain(operand: Tensor, *others: Tensor) -> bool:
    """Return whether torch multiplies these as they are."""
    return all(each.dtype == operand.dtype for each in others) and not _is_emulated(operand)


def _read(tensor: Tensor, operand: Tensor) -> Tensor:
    """Return the tensor as a product with ``operand`` reads it."""
    rounded = tensor.to(operand.dtype)
    return rounded.float() if _is_emulated(operand) else rounded


def _new(A_gCK: Tensor, B_gKN: Tensor) -> Tensor:
    return A_gCK.new_empty(*A_gCK.shape[:2], B_gKN.shape[2])


def _is_emulated(operand: Tensor) -> bool:
    # Check the dtype first: this runs at every product, and must cost nothing next to a small one.
    return operand.dtype in HALVES and is_emulated(operand.device, operand.dtype)


def _few_at_once(*batches_gXY: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Return the batches in equal slices of experts, as many as fit :data:`_ELEMENTS_AT_ONCE`.

    On a device it is one slice, and one launch.
    """
    if not batches_gXY[0].is_cpu:
        return iter([batches_gXY])
    # Small slices, because float32 copies that fit the cache cost little, and a copy of the whole
    # weight stack would take twice its memory.
    of_expert = sum(batch[0].numel() for batch in batches_gXY) if len(batches_gXY[0]) else 1
    experts = max(1, _ELEMENTS_AT_ONCE // max(1, of_expert))
    return zip(*(batch.split(experts) for batch in batches_gXY), strict=True)


def _rows_of_experts(offs_E: Tensor) -> list[slice]:
    """Return each expert's rows. Only for the CPU, where reading offsets waits for no device."""
    return [slice(start, end) for start, end in pairwise([0, *offs_E.tolist()])]
