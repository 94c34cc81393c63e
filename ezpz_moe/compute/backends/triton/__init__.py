"""``triton``: grouped products in Triton, for NVIDIA and ROCm GPUs. No device-host sync.

Forward is two launches, backward five. The counts stay on the device (:mod:`.kernels` says how a
program finds its rows), and a CUDA graph can capture both. Weights are read through their strides.
Activations, their derivatives and biases are computed while a product's tile is in registers; in a
routed layer so is the product with the scores, and rows are gathered while they are loaded. Biases
take three launches more in backward, for the sums of their gradients.

float32 is computed in float32, never in tf32: the contract's bound is that of the plain loop in the
same dtype. On the CPU only Triton's interpreter runs, slowly, for tests.

Triton is imported with the first product, so this file loads without it.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ezpz_moe.compute.autograd import KernelBackend, Operators
from ezpz_moe.compute.ffn import kernels_by_name

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _launched(name: str) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        from ezpz_moe.compute.backends.triton import launch

        return getattr(launch, name)(*arguments)

    return kernel


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
    operators = Operators("triton", kernels_by_name(_launched))

    def _why_not(self, device: torch.device, dtype: torch.dtype, dims: Sequence[int]) -> list[str]:
        if find_spec("triton") is None:
            return [
                "Triton is not installed (torch brings it for CUDA and ROCm on Linux): install "
                "it, or use grouped_mm or for_loop"
            ]
        reasons = (_against_device(device), _against_dtype(device, dtype))
        return [reason for reason in reasons if reason]


BACKEND = Triton()
