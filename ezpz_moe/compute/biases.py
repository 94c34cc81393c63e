"""Biases of experts as grouped products.

A bias adds the same row to all rows of an expert: the product of a column of ones with the bias as
a matrix of one row. And its gradient is the sum of an expert's rows: the same column, transposed,
times the gradient. So whatever multiplies rows grouped by expert needs nothing else for biases:
empty experts, the tail and dropped rows are what they are in every other product, and no two rows
are added by atomics.

Legend of the suffixes: :mod:`.contract`. C = columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute.layouts import laid_out_like

_COLUMN_BYTES = 16
"""``torch._grouped_mm`` reads rows of a multiple of so many bytes."""


def bias_columns(factor_R: Tensor, dtype: torch.dtype) -> Tensor:
    """Return columns_RC in ``dtype``: the factor of each row, what its rounding leaves, zeros."""
    rounded_R = factor_R.to(dtype)
    # Of a score in float32 half a dtype keeps 8 bits; the second column has the next 8.
    columns_R2 = torch.stack([rounded_R, (factor_R - rounded_R).to(dtype)], 1)
    return F.pad(columns_R2, (0, _COLUMN_BYTES // dtype.itemsize - 2))


def bias_matrices(bias_EX: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices_ECX: :func:`bias_columns` times them is the factor times the bias."""
    twice_E2X = bias_EX.to(dtype).unsqueeze(1).expand(-1, 2, -1)
    return F.pad(twice_E2X, (0, 0, 0, _COLUMN_BYTES // dtype.itemsize - 2))


def sums_like(bias_EX: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in shape and dtype of ``gradient.T @ columns`` per expert, [E, X, C]."""
    return bias_EX.unsqueeze(2).expand(-1, -1, _COLUMN_BYTES // dtype.itemsize)


def bias_gradient(sums_EXC: Tensor, bias_EX: Tensor) -> Tensor:
    """Return the gradient of a bias from these sums."""
    return laid_out_like(sums_EXC[..., 0] + sums_EXC[..., 1], bias_EX)


def score_gradients(
    grad_out_TD: Tensor, b2_ED: Tensor, token_R: Tensor, num_tokens_per_expert_E: Tensor
) -> Tensor:
    """Return what b2 adds to the gradient of each row's score, ``grad_out[token] . b2[expert]``.

    In float32 or wider, [R]; zero for tail rows. All tokens times all biases, of which a row picks
    one: E columns cost next to nothing beside an FFN, and no [R, D] is made.
    """
    wider = torch.promote_types(grad_out_TD.dtype, torch.float32)
    dots_TE = grad_out_TD.to(wider) @ b2_ED.to(wider).T
    counts_E = num_tokens_per_expert_E.to(token_R.device, non_blocking=True).contiguous()
    row_R = torch.arange(len(token_R), device=token_R.device)
    # right=True skips experts without rows, whose end is also the next expert's first row.
    expert_R = torch.searchsorted(torch.cumsum(counts_E, 0), row_R, right=True)
    last = b2_ED.shape[0] - 1
    return torch.where(expert_R > last, 0, dots_TE[token_R, expert_R.clamp(max=last)])
