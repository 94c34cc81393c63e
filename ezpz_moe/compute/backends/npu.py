"""``npu``: ``torch_npu.npu_grouped_matmul`` on Huawei's Ascend NPUs. No device-host sync.

torch_npu is imported with the first product, never when this file is loaded. This file relies on
the documentation: https://www.hiascend.com/document, torch_npu.npu_grouped_matmul (PyTorch 7.3).
With x, weight and result as one tensor each, and ``group_list`` an int64 tensor of inclusive
offsets (``group_list_type=0``):

- ``group_type=0`` groups the rows of x: x [R, K] not transposed, weight [E, K, N] or a transposed
  view of [E, N, K], result [R, N];
- ``group_type=2`` groups the terms of the sum: x [K, R] a transposed view, weight [R, N] not
  transposed, result [E, K, N].

In both cases the last offset has to be R. So tail rows count as the last expert's; they are set to
zero beforehand, which adds nothing to a gradient, and so are results afterwards: an expert without
rows may have NaN weights. The documentation does not mention a group without terms: the gradient of
an expert without rows is set to zero afterwards. Empty tensors are not accepted.

Never run on an NPU: tested against a stand-in with that signature.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Self

import torch
from torch import Tensor

from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.contract import offsets_of_counts, offsets_on_device
from ezpz_moe.compute.ffn import kernels_of
from ezpz_moe.compute.grouping import Grouping
from ezpz_moe.compute.layouts import laid_out_like

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INNER_LIMIT = 65536  # documented: every last dimension has to be smaller


class _Groups(Grouping):
    """The experts' rows in the form that ``npu_grouped_matmul`` expects.

    Attributes:
        ends_E: inclusive offsets; the last is R.
        owned_R1: no tail row.
        empty_E11: experts without rows.
    """

    def __init__(self, offs_E: Tensor, num_rows: int) -> None:
        rows_R = torch.arange(num_rows, device=offs_E.device)
        # The last offset must be R, so the last expert gets the tail: zero rows, which change
        # nothing.
        ends_E = torch.cat([offs_E[:-1], offs_E.new_full((1,), num_rows)])
        self.ends_E = ends_E.to(torch.int64)
        self.owned_R1 = (rows_R < offs_E[-1]).unsqueeze(1)
        self.empty_E11 = torch.diff(offs_E, prepend=offs_E.new_zeros(1)).eq(0)[:, None, None]

    @classmethod
    def of_counts(cls, counts_E: Tensor, rows_RX: Tensor) -> Self:
        return cls(offsets_of_counts(counts_E, rows_RX), rows_RX.shape[0])

    @classmethod
    def of_offsets(cls, offs_E: Tensor, rows_RX: Tensor) -> Self:
        return cls(offsets_on_device(offs_E, rows_RX), rows_RX.shape[0])

    def zero_tail_(self, rows_RX: Tensor) -> Tensor:
        return rows_RX.masked_fill_(~self.owned_R1, 0)

    def operand(self, rows_RX: Tensor) -> Tensor:
        """Return the rows with a tail of zeros, contiguous."""
        # where, not a product with the mask: tail rows may hold NaN.
        return torch.where(self.owned_R1, rows_RX, 0).contiguous()

    def multiply(self, A: Tensor, B_EKN: Tensor, out_RN: Tensor | None = None) -> Tensor:
        # The tail of the result is NaN if the last expert has no rows and its matrix holds NaN.
        if not A.shape[0]:
            return A.new_zeros(0, B_EKN.shape[2])
        return self._call(A, _readable(B_EKN.to(A.dtype)), group_type=0)

    def multiply_sum(
        self, A: Tensor, B_EKN: Tensor, A2: Tensor, B2_ELN: Tensor, out_RN: Tensor | None = None
    ) -> Tensor:
        return self.multiply(A, B_EKN).add_(self.multiply(A2, B2_ELN))

    def weight_gradient(self, left: Tensor, right: Tensor, like_EMN: Tensor) -> Tensor:
        if not left.shape[0]:
            return torch.zeros_like(like_EMN)
        grad_EMN = self._call(left.T, right, group_type=2)
        return laid_out_like(grad_EMN.masked_fill_(self.empty_E11, 0), like_EMN)

    def _call(self, x: Tensor, weight: Tensor, group_type: int) -> Tensor:
        # split_item=3 asks for one result tensor. Import here: torch_npu looks for an NPU when it
        # is imported.
        (result,) = importlib.import_module("torch_npu").npu_grouped_matmul(
            [x],
            [weight],
            group_list=self.ends_E,
            group_list_type=0,
            group_type=group_type,
            split_item=3,
        )
        return result


def _readable(B_EKN: Tensor) -> Tensor:
    """Copy B only if it is neither contiguous nor the transpose of a contiguous tensor."""
    if B_EKN.is_contiguous() or B_EKN.transpose(1, 2).is_contiguous():
        return B_EKN
    return B_EKN.contiguous()


def _against_torch_npu(device: torch.device) -> str | None:
    if find_spec("torch_npu") is None:
        return (
            "torch_npu is not installed: install the one for your torch and CANN "
            "(https://www.hiascend.com), or use for_loop"
        )
    if device.type != "npu":
        return None  # importing torch_npu would look for an NPU
    try:
        found = hasattr(importlib.import_module("torch_npu"), "npu_grouped_matmul")
    except (ImportError, OSError, RuntimeError) as error:
        return f"torch_npu cannot be imported ({error}): repair the installation, or use for_loop"
    return None if found else "this torch_npu has no npu_grouped_matmul: update it, or use for_loop"


@dataclass(frozen=True)
class Npu(KernelBackend):
    """Grouped products of torch_npu. See the module's text."""

    name = "npu"
    summary = "torch_npu.npu_grouped_matmul, no device-host sync; Ascend NPUs, never run on one"
    host_syncs = False
    static_shapes = True
    operators = Operators("npu", kernels_of(_Groups))

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        reasons = []
        if device.type not in ("npu", "meta"):
            reasons.append(f"it runs on Ascend NPUs, not on {device.type}: use for_loop")
        if missing := _against_torch_npu(device):
            reasons.append(missing)
        if dtype not in _DTYPES:
            reasons.append(
                f"npu_grouped_matmul takes float32, bfloat16 and float16, not {dtype}: use one of "
                f"them, or for_loop"
            )
        reasons += [
            f"npu_grouped_matmul takes dimensions below {_INNER_LIMIT}, not {dim}: use for_loop"
            for dim in dict.fromkeys(dims)
            if dim >= _INNER_LIMIT
        ]
        return reasons


BACKEND = Npu()
