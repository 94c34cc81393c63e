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
