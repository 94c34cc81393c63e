"""The truth that backends are measured against: a plain loop in float64, and the error bound.

Written for reading, not for speed: slices, ``@`` and autograd, sharing nothing with a backend.
Legend of the suffixes: :mod:`.contract`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("y", "grad_w1", "grad_w2", "grad_w3", "grad_x")


@dataclass(frozen=True)
class Case:
    """One expert layer's inputs, and the gradient that arrives at its output."""

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor
    x_RD: Tensor
    num_tokens_per_expert_E: Tensor
    grad_y_RD: Tensor

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Case":
        """Move the case to another device and floating dtype; counts stay integers."""
        return Case(
            self.w1_EFD.to(device, dtype),
            self.w2_EDF.to(device, dtype),
            self.w3_EFD.to(device, dtype),
            self.x_RD.to(device, dtype),
            self.num_tokens_per_expert_E.to(device),
            self.grad_y_RD.to(device, dtype),
        )


def random_case(
    counts: list[int],
    *,
    dim: int,
    hidden_dim: int,
    tail: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Make random inputs of an expert layer; the ``tail`` rows of x hold NaN.

    So do the weights of experts without tokens. Weights are scaled by the square root of their
    inner dimension: every product then keeps the scale of its input, whatever the sizes.
    """
    # Draw on the CPU in float32 and convert: a seed then gives the same case on every device and,
    # but for rounding, in every dtype.
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)

    E, R = len(counts), sum(counts) + tail
    x_RD = normal(R, dim)
    # A kernel that reads tail rows, even to multiply them by zero, shows it.
    x_RD[sum(counts) :] = torch.nan
    counts_E = torch.tensor(counts, device=device, dtype=torch.int64)
    case = Case(
        w1_EFD=normal(E, hidden_dim, dim, scale=dim**-0.5),
        w2_EDF=normal(E, dim, hidden_dim, scale=hidden_dim**-0.5),
        w3_EFD=normal(E, hidden_dim, dim, scale=dim**-0.5),
        x_RD=x_RD,
        num_tokens_per_expert_E=counts_E,
        grad_y_RD=normal(R, dim),
    )
    # Likewise for one that multiplies padding of an expert that has nothing else.
    for weights in (case.w1_EFD, case.w2_EDF, case.w3_EFD):
        weights[counts_E == 0] = torch.nan
    return case


def plain_loop(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, counts_E: Tensor
) -> Tensor:
    """Compute the expert FFN as one would write it on a blackboard; tail rows are zero."""
    counts = counts_E.tolist()
    # The tail is never multiplied, since it may hold NaN.
    *chunks_RD, tail_RD = x_RD.split([*counts, len(x_RD) - sum(counts)])
    outputs_RD = [
        (F.silu(x_nD @ w1_FD.T) * (x_nD @ w3_FD.T)) @ w2_DF.T
        for x_nD, w1_FD, w2_DF, w3_FD in zip(
            chunks_RD, w1_EFD.unbind(), w2_EDF.unbind(), w3_EFD.unbind(), strict=True
        )
    ]
    # Adds zero. Without experts, what remains is then still a function of every input.
    nothing = sum(each[:0].sum() for each in (w1_EFD, w2_EDF, w3_EFD, x_RD))
    return torch.cat([*outputs_RD, torch.zeros_like(tail_RD)]) + nothing


def run(swiglu: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    """Run ``swiglu``; return its output and the four gradients by name, as in :data:`NAMES`."""
    inputs = [
        tensor.detach().requires_grad_()
        for tensor in (case.w1_EFD, case.w2_EDF, case.w3_EFD, case.x_RD)
    ]
    y_RD = swiglu(*inputs, case.num_tokens_per_expert_E)
    # allow_unused: a backend that loses a gradient returns None here, and the caller can say which.
    gradients = torch.autograd.grad(y_RD, inputs, case.grad_y_RD, allow_unused=True)
    return dict(zip(NAMES, (y_RD.detach(), *gradients), strict=True))


def truth(case: Case) -> dict[str, Tensor]:
    """Compute the output and gradients in float64, on the CPU: some accelerators lack float64."""
    return run(plain_loop, case.to("cpu", torch.float64))


def relative_error(value: Tensor, true: Tensor) -> float:
    """Return ``|value - true| / |true|`` in the Frobenius norm; just ``|value|`` if true is zero.

    ``value`` may be on any device; ``true`` is on the CPU in float64.
    """
    difference = torch.linalg.vector_norm(value.cpu().double() - true).item()
    scale = torch.linalg.vector_norm(true).item()
    return difference / scale if scale else difference


def error_bounds(case: Case, true: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative errors allowed: twice the plain loop's in its dtype, + 1e-6."""
    plain = run(plain_loop, case)
    # Twice, because another order of summation gives an error of the same size but not the same
    # one. 1e-6 is for values where the plain loop happens to be exact, such as all zeros.
    return {name: 2 * relative_error(plain[name], true[name]) + 1e-6 for name in NAMES}
