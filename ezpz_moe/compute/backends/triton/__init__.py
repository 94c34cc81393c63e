"""``triton``: grouped products in Triton, for NVIDIA and ROCm GPUs. No device-host sync.

Forward is two launches, backward five. The counts stay on the device (:mod:`.kernels` says how a
program finds its rows), and a CUDA graph can capture both. Weights are read through their strides.
SwiGLU and its derivative are computed while a product's tile is in registers; in a routed layer so
is the product with the scores, and rows are gathered while they are loaded.

float32 is computed in float32, never in tf32: the contract's bound is that of the plain loop in the
same dtype. On the CPU only Triton's interpreter runs, slowly, for tests.

Triton is imported with the first product, so this file loads without it.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ezpz_moe.compute.autograd import KernelBackend, Kernels, Operators

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    from ezpz_moe.compute.backends.triton import launch

    return launch.mm(A_RK, B_EKN, offs_E)


def _mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    from ezpz_moe.compute.backends.triton import launch

    return launch.mm_backward(grad_C_RN, A_RK, B_EKN, offs_E)


def _ffn(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from ezpz_moe.compute.backends.triton import launch

    return launch.ffn(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)


def _ffn_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ezpz_moe.compute.backends.triton import launch

    return launch.ffn_backward(
        grad_y_RD, w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E, gate_RF, up_RF
    )


def _routed(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    num_tokens_per_expert_E: Tensor,
    num_rows: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ezpz_moe.compute.backends.triton import launch

    inputs = (w1_EFD, w2_EDF, w3_EFD, x_TD, scores_TK, ids_TK, num_tokens_per_expert_E)
    return launch.routed(*inputs, num_rows, dtype)


def _routed_backward(
    grad_out_TD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_TD: Tensor,
    scores_TK: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
    order_R: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ezpz_moe.compute.backends.triton import launch

    inputs = (w1_EFD, w2_EDF, w3_EFD, x_TD, scores_TK, num_tokens_per_expert_E)
    return launch.routed_backward(grad_out_TD, *inputs, gate_RF, up_RF, order_R, dtype)


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _against_device(device: torch.device) -> str | None:
    if device.type == "meta":
        return None
    if device.type not in ("cpu", "cuda"):
        return (
            f"its kernels are written for CUDA and ROCm, not for {device.type}: use "
            f"for_loop or batched_mm_padded"
        )
    if device.type == "cpu" and not _interpreted():
        return (
            "Triton compiles for GPUs; on the CPU only its interpreter runs, for tests, with "
            "TRITON_INTERPRET=1 in the environment: use for_loop or grouped_mm"
        )
    if device.type == "cuda" and _interpreted():
        return "TRITON_INTERPRET=1 interprets kernels on the CPU: unset it to run them on a GPU"
    return None


def _against_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in _DTYPES:
        return f"its kernels compute in float32, bfloat16 and float16, not in {dtype}: use for_loop"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "Triton's interpreter gives wrong bfloat16 products: use float32 or float16 there"
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "this GPU has no bfloat16 (NVIDIA: SM80 and newer do): use float16 or float32"
    return None


@dataclass(frozen=True)
class Triton(KernelBackend):
    """Grouped products in Triton. See the module's text."""

    name = "triton"
    summary = "our Triton kernels, SwiGLU fused, no device-host sync; CUDA and ROCm"
    host_syncs = False
    static_shapes = True
    operators = Operators(
        "triton",
        Kernels(_mm, _mm_backward, _ffn, _ffn_backward, _routed, _routed_backward),
    )

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        if find_spec("triton") is None:
            return [
                "Triton is not installed (torch brings it for CUDA and ROCm on Linux): install "
                "it, or use grouped_mm or for_loop"
            ]
        reasons = (_against_device(device), _against_dtype(device, dtype))
        return [reason for reason in reasons if reason]


BACKEND = Triton()
