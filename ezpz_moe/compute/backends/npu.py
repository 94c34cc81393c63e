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

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators
from ezpz_moe.compute.contract import laid_out_like, offsets_of_counts, offsets_on_device
from ezpz_moe.compute.elementwise import swiglu_gradients_

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INNER_LIMIT = 65536  # documented: every last dimension has to be smaller


@dataclass(frozen=True)
class _Groups:
    """The experts' rows in the form that ``npu_grouped_matmul`` expects."""

    ends_E: Tensor  # inclusive offsets; the last is R
    owned_R1: Tensor  # no tail row
    empty_E11: Tensor  # experts without rows

    @classmethod
    def of(cls, offs_E: Tensor, num_rows: int) -> "_Groups":
        rows_R = torch.arange(num_rows, device=offs_E.device)
        return cls(
            # The last offset must be R, so the last expert gets the tail: zero rows, which change
            # nothing.
            ends_E=torch.cat([offs_E[:-1], offs_E.new_full((1,), num_rows)]).to(torch.int64),
            owned_R1=(rows_R < offs_E[-1]).unsqueeze(1),
            empty_E11=torch.diff(offs_E, prepend=offs_E.new_zeros(1)).eq(0)[:, None, None],
        )

    def owned(self, rows_RX: Tensor) -> Tensor:
        """Return the rows with a tail of zeros, contiguous."""
        # where, not a product with the mask: tail rows may hold NaN.
        return torch.where(self.owned_R1, rows_RX, 0).contiguous()

    def zero_tail(self, rows_RX: Tensor) -> Tensor:
        """Set the tail rows of a result to zero, in place."""
        return rows_RX.masked_fill_(~self.owned_R1, 0)

    def multiply(self, A_RK: Tensor, B_EKN: Tensor) -> Tensor:
        """Compute ``C[r] = A[r] @ B[expert of r]``. A must be contiguous, with a tail of zeros.

        The tail of C is NaN if the last expert has no rows and its matrix holds NaN.
        """
        if not A_RK.shape[0]:
            return A_RK.new_zeros(0, B_EKN.shape[2])
        return self._call(A_RK, _readable(B_EKN), group_type=0)

    def weight_gradient(self, left_RK: Tensor, right_RN: Tensor, like: Tensor) -> Tensor:
        """Compute ``left[rows].T @ right[rows]`` per expert, laid out like ``like`` [E, K, N]."""
        if not left_RK.shape[0]:
            return torch.zeros_like(like)
        grad_EKN = self._call(left_RK.T, right_RN, group_type=2)
        return laid_out_like(grad_EKN.masked_fill_(self.empty_E11, 0), like)

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


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    groups = _Groups.of(offsets_on_device(offs_E, A_RK), A_RK.shape[0])
    return groups.zero_tail(groups.multiply(groups.owned(A_RK), B_EKN))


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    groups = _Groups.of(offsets_on_device(offs_E, A_RK), A_RK.shape[0])
    grad_C_RN = groups.owned(grad_C_RN)
    grad_A_RK = groups.zero_tail(groups.multiply(grad_C_RN, B_EKN.transpose(1, 2)))
    grad_B_EKN = groups.weight_gradient(groups.owned(A_RK), grad_C_RN, B_EKN)
    return laid_out_like(grad_A_RK, A_RK), grad_B_EKN


def _gate_and_up(
    groups: _Groups, w1_EFD: Tensor, w3_EFD: Tensor, x_RD: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        groups.multiply(x_RD, w1_EFD.transpose(1, 2)),
        groups.multiply(x_RD, w3_EFD.transpose(1, 2)),
    )


def _swiglu(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _Groups.of(offsets_of_counts(num_tokens_per_expert_E, x_RD), x_RD.shape[0])
    gate_RF, up_RF = _gate_and_up(groups, w1_EFD, w3_EFD, groups.owned(x_RD))
    y_RD = groups.multiply(F.silu(gate_RF).mul_(up_RF), w2_EDF.transpose(1, 2))
    return groups.zero_tail(y_RD), gate_RF, up_RF


def _swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = _Groups.of(offsets_of_counts(num_tokens_per_expert_E, x_RD), x_RD.shape[0])
    owned_x_RD, grad_y_RD = groups.owned(x_RD), groups.owned(grad_y_RD)
    if gate_RF is None or up_RF is None:
        gate_RF, up_RF = _gate_and_up(groups, w1_EFD, w3_EFD, owned_x_RD)
    else:
        # ``auto`` may have computed forward with a backend that leaves rows of the tail unwritten,
        # and here the tail's rows count as the last expert's: 0 times NaN would be NaN.
        gate_RF, up_RF = groups.owned(gate_RF), groups.owned(up_RF)
    activated_RF = F.silu(gate_RF)
    # w2's gradient first: swiglu_gradients_ overwrites activated.
    grad_w2_EDF = groups.weight_gradient(grad_y_RD, activated_RF * up_RF, w2_EDF)

    grad_hidden_RF = groups.multiply(grad_y_RD, w2_EDF)
    grad_gate_RF, grad_up_RF = swiglu_gradients_(grad_hidden_RF, activated_RF, gate_RF, up_RF)
    grad_x_RD = groups.multiply(grad_gate_RF, w1_EFD).add_(groups.multiply(grad_up_RF, w3_EFD))
    return (
        groups.weight_gradient(grad_gate_RF, owned_x_RD, w1_EFD),
        grad_w2_EDF,
        groups.weight_gradient(grad_up_RF, owned_x_RD, w3_EFD),
        laid_out_like(groups.zero_tail(grad_x_RD), x_RD),
    )


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
    operators = Operators("npu", Kernels(_mm, _mm_backward, _swiglu, _swiglu_backward))

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
