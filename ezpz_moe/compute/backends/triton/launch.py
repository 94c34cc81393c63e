"""The contract's four kernels as launches of :mod:`.kernels`. No device-host sync.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ezpz_moe.compute.backends.triton import kernels
from ezpz_moe.compute.contract import offsets_of_counts, offsets_on_device


def _slots(R: int, E: int, N: int) -> Callable[[dict[str, int]], tuple[int]]:
    """Return the grid of a kernel over rows: see :mod:`.kernels`."""
    return lambda meta: ((R // meta["BLOCK_R"] + E + 1) * triton.cdiv(N, meta["BLOCK_N"]),)


# R_BUCKET is the key under which tile sizes are remembered; the kernels compute with R.
def _sizes(E: int, R: int, K: int, N: int) -> tuple[int, ...]:
    """Return E, R, R_BUCKET, K, N."""
    return E, R, triton.next_power_of_2(max(R, 1)), K, N


def _block_e(E: int) -> int:
    # tl.arange needs a power of two.
    return triton.next_power_of_2(E + 1)  # one more, for the tail


def _multiply(
    A_RK: Tensor,
    B_EKN: Tensor,
    offs_E: Tensor,
    C_RN: Tensor,
    second: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute ``C[r] = A[r] @ B[e]``, plus the product of a second pair of the same sizes."""
    # Without a second pair the kernel does not read these; it only needs valid pointers.
    A2_RK, B2_EKN = second or (A_RK, B_EKN)
    (R, K), (E, _, N) = A_RK.shape, B_EKN.shape
    strides = (A_RK, B_EKN, A2_RK, B2_EKN, C_RN)
    kernels.multiply[_slots(R, E, N)](
        A_RK, B_EKN, A2_RK, B2_EKN, offs_E, C_RN, *_sizes(E, R, K, N),
        *(stride for tensor in strides for stride in tensor.stride()),
        SECOND=second is not None, BLOCK_E=_block_e(E),
    )  # fmt: skip
    return C_RN


def _weight_gradient(left_RK: Tensor, right_RN: Tensor, offs_E: Tensor, like: Tensor) -> Tensor:
    """Compute ``left[rows].T @ right[rows]`` per expert, laid out like ``like`` [E, K, N]."""
    grad_EKN = torch.empty_like(like)
    E, K, N = like.shape
    kernels.weight_gradient[
        lambda meta: (E * triton.cdiv(K, meta["BLOCK_R"]) * triton.cdiv(N, meta["BLOCK_N"]),)
    ](
        left_RK, right_RN, offs_E, grad_EKN, *_sizes(E, left_RK.shape[0], K, N),
        *left_RK.stride(), *right_RN.stride(), *grad_EKN.stride(),
    )  # fmt: skip
    return grad_EKN


def _gate_and_up(
    x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, offs_E: Tensor, hidden_RF: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute gate and up; if hidden is given, write ``silu(gate) * up`` into it."""
    (R, D), (E, F, _) = x_RD.shape, w1_EFD.shape
    gate_RF, up_RF = x_RD.new_empty(R, F), x_RD.new_empty(R, F)
    kernels.gate_and_up[_slots(R, E, F)](
        x_RD, w1_EFD, w3_EFD, offs_E, gate_RF, up_RF, gate_RF if hidden_RF is None else hidden_RF,
        *_sizes(E, R, D, F), *x_RD.stride(), *w1_EFD.stride(), *w3_EFD.stride(),
        HIDDEN_TOO=hidden_RF is not None, BLOCK_E=_block_e(E),
    )  # fmt: skip
    return gate_RF, up_RF


def mm(A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor) -> Tensor:
    """Multiply rows by their expert's matrix, in one launch."""
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(A_RK):
        offs_E = offsets_on_device(offs_E, A_RK)
        return _multiply(A_RK, B_EKN, offs_E, A_RK.new_empty(A_RK.shape[0], B_EKN.shape[2]))


def mm_backward(
    grad_C_RN: Tensor, A_RK: Tensor, B_EKN: Tensor, offs_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of A and B, in two launches."""
    with torch.cuda.device_of(A_RK):
        offs_E = offsets_on_device(offs_E, A_RK)
        grad_A_RK = _multiply(grad_C_RN, B_EKN.transpose(1, 2), offs_E, torch.empty_like(A_RK))
        return grad_A_RK, _weight_gradient(A_RK, grad_C_RN, offs_E, B_EKN)


def swiglu(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, num_tokens_per_expert_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the FFN in two launches: gate, up and their SwiGLU; then the product with w2."""
    with torch.cuda.device_of(x_RD):
        offs_E = offsets_of_counts(num_tokens_per_expert_E, x_RD)
        # Not kept for backward, which computes it again from two tiles that it loads anyway.
        hidden_RF = x_RD.new_empty(x_RD.shape[0], w1_EFD.shape[1])
        gate_RF, up_RF = _gate_and_up(x_RD, w1_EFD, w3_EFD, offs_E, hidden_RF)
        y_RD = x_RD.new_empty(x_RD.shape)
        return _multiply(hidden_RF, w2_EDF.transpose(1, 2), offs_E, y_RD), gate_RF, up_RF


def swiglu_backward(
    grad_y_RD: Tensor,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_RD: Tensor,
    num_tokens_per_expert_E: Tensor,
    gate_RF: Tensor | None,
    up_RF: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all gradients, in five launches, or six without gate and up. Holds three [R, F]."""
    with torch.cuda.device_of(x_RD):
        offs_E = offsets_of_counts(num_tokens_per_expert_E, x_RD)
        if gate_RF is None or up_RF is None:
            gate_RF, up_RF = _gate_and_up(x_RD, w1_EFD, w3_EFD, offs_E, None)
        (E, D, F), R = w2_EDF.shape, x_RD.shape[0]
        hidden_RF, grad_gate_RF, grad_up_RF = (torch.empty_like(gate_RF) for _ in range(3))
        kernels.hidden_gradients[_slots(R, E, F)](
            grad_y_RD, w2_EDF, gate_RF, up_RF, offs_E, hidden_RF, grad_gate_RF, grad_up_RF,
            *_sizes(E, R, D, F), *grad_y_RD.stride(), *w2_EDF.stride(), BLOCK_E=_block_e(E),
        )  # fmt: skip
        # Both paths to x in one sum: no [R, D] in between, and one rounding.
        grad_x_RD = _multiply(
            grad_gate_RF, w1_EFD, offs_E, torch.empty_like(x_RD), second=(grad_up_RF, w3_EFD)
        )
        return (
            _weight_gradient(grad_gate_RF, x_RD, offs_E, w1_EFD),
            _weight_gradient(grad_y_RD, hidden_RF, offs_E, w2_EDF),
            _weight_gradient(grad_up_RF, x_RD, offs_E, w3_EFD),
            grad_x_RD,
        )
