"""From a token to the logits of its experts. Legend of the suffixes: :mod:`ezpz_moe.routing`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def jittered(x: Tensor, noise: float) -> Tensor:
    """Multiply each element of x by its own draw from [1 - noise, 1 + noise], in x's dtype.

    The draws have at least float32: bfloat16 has only four values within 1 % of 1, most of them
    below.

    Source: Switch Transformers, arXiv 2101.03961, section 2.2 (exploration by input jitter).

    Args:
        x: the gate's input, any shape and floating dtype.
        noise: in [0, 1).
    """
    draws = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    return (x * draws.uniform_(1 - noise, 1 + noise)).to(x.dtype)


def losing_infinities(logits_BLE: Tensor) -> Tensor:
    """The logits, with NaN where they are infinite: the loss then shows it.

    -inf alone would merely bar an expert, and an activation would turn it into an ordinary number.
    """
    return logits_BLE + (logits_BLE - logits_BLE).detach()  # adds 0, but inf - inf is NaN


def activated(logits_BLE: Tensor, activation: str) -> Tensor:
    """The logits after ``"identity"``, ``"softplus"`` or ``"relu_rmsnorm"``, in their dtype.

    ``relu_rmsnorm`` divides ReLU's result by its root mean square over the experts, like the router
    of BlockFFN (arXiv 2507.08771, equation 3), but without a learned scale, which would add a
    parameter. A token whose logits are all negative gets equal logits.

    Raises:
        ValueError: unknown activation.
    """
    match activation:
        case "identity":
            return logits_BLE
        case "softplus":
            return F.softplus(logits_BLE)
        case "relu_rmsnorm":
            return F.rms_norm(logits_BLE.relu(), logits_BLE.shape[-1:])
    raise ValueError(f"activation: {activation!r} is not one of identity, softplus, relu_rmsnorm")
