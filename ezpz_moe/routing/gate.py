"""The steps around the choice of experts: the logits before it, zero-computation experts after it.

A host's gate calls three functions, in this order: :func:`gate_input`, :func:`gate_product` and
:func:`gate_logits`. Each applies the options of ``[router]``; a new one is a line there.

Zero-computation experts have no FFN and are numbered after the routed ones. A null expert outputs
zero, a copy expert its input, a constant expert a learned mix of its input and a learned vector.
Sources: AdaMoE, arXiv 2406.13233 (null experts); MoE++, arXiv 2410.07348 (zero, copy and constant
experts, equations 3 to 5).

Legend of the suffixes: :mod:`ezpz_moe.routing`; C = constant experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.config.routing_schema import Router


def gate_input(x: Tensor, settings: Router, *, training: bool) -> Tensor:
    """Return the gate's input with what the options do to it."""
    if training and settings.jitter_noise:
        x = jittered(x, settings.jitter_noise)
    return x


def gate_product(
    x: Tensor, weight_ED: Tensor, bias_E: Tensor | None, settings: Router
) -> Tensor | None:
    """Return the gate's product as the options want it, or None if the host's own will do."""
    if settings.gate_precision is None:
        return None
    dtype = getattr(torch, settings.gate_precision)
    bias_E = None if bias_E is None else bias_E.to(dtype)
    # autocast would turn the product back into bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        logits_BLE = F.linear(x.to(dtype), weight_ED.to(dtype), bias_E)
    # Only the product has that precision: bfloat16 scores would tie where they are merely close.
    return logits_BLE.to(torch.promote_types(dtype, torch.float32))


def gate_logits(
    logits_BLE: Tensor,
    settings: Router,
    now: Mapping[str, Tensor | float],
    *,
    is_counted: bool,
    scale_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gate's logits with what the options do to them: before the activation, and after.

    Args:
        logits_BLE: the gate's product.
        settings: the flavor's.
        now: the values of ``settings.schedules`` in this training step.
        is_counted: whether telemetry reports logits that are not finite.
        scale_E: the activation's learned scale, if it has one.
    """
    if "temperature" in now:
        logits_BLE = logits_BLE / now["temperature"]
    # Telemetry stops the run if logits are not finite. Without it, or if an activation hides an
    # infinity from the counters, the loss has to become NaN.
    if not (is_counted and settings.activation == "identity"):
        logits_BLE = losing_infinities(logits_BLE)
    return logits_BLE, activated(logits_BLE, settings.activation, scale_E)


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
    """Return the logits, with NaN where they are infinite: the loss then shows it.

    -inf alone would merely bar an expert, and an activation would turn it into an ordinary number.
    """
    # Detached: finite logits keep their gradient unchanged.
    return logits_BLE + (logits_BLE - logits_BLE).detach()  # adds 0, but inf - inf is NaN


def activated(logits_BLE: Tensor, activation: str, scale_E: Tensor | None = None) -> Tensor:
    """Return the logits after ``"identity"``, ``"softplus"`` or ``"relu_rmsnorm"``, in their dtype.

    ``relu_rmsnorm`` divides ReLU's result by its root mean square over the experts, like the router
    of BlockFFN (arXiv 2507.08771, equation 3). ``scale_E`` multiplies that, if there is one. A
    token whose logits are all negative gets equal logits.

    Raises:
        ValueError: unknown activation.
    """
    match activation:
        case "identity":
            return logits_BLE
        case "softplus":
            return F.softplus(logits_BLE)
        case "relu_rmsnorm":
            normed_BLE = F.rms_norm(logits_BLE.relu(), logits_BLE.shape[-1:])
            return normed_BLE if scale_E is None else normed_BLE * scale_E.to(normed_BLE.dtype)
    raise ValueError(f"activation: {activation!r} is not one of identity, softplus, relu_rmsnorm")


# Temperatures beyond these leave a gate nothing to learn in float32: logits of 1 become scores that
# all round to the same, and exp underflows where logits differ by a hundredth.
HOTTEST, COLDEST = 2.0**24, 1e-4


def why_untrained(
    settings: Router, *, score_func: str, experts: int, top_k: int, norm: bool
) -> Iterator[str]:
    """Yield why the model's loss teaches a gate nothing: its gradient is zero, or vanishes.

    A gate that is frozen is meant to learn nothing, and is not named.

    Args:
        settings: a flavor's, or the defaults for the host's own router.
        score_func: of the router.
        experts: what it chooses from.
        top_k: choices of a token.
        norm: whether a token's weights are divided by their sum.
    """
    if settings.freeze:
        return
    learns = "the gate learns nothing from the model's loss"
    if settings.routing == "balanced":
        yield (
            f'[router] routing = "balanced": {learns}, as experts are taken in turn. '
            'Set it to "topk" to train a router; to take turns on purpose, also set freeze = true'
        )
        return
    if experts == 1 and score_func == "softmax":
        yield (
            f"{learns}: there is one expert, whose softmax is 1. Give the layer more experts; if "
            "one is meant, set [router] freeze = true"
        )
    elif top_k == 1 and norm:
        yield (
            f"{learns}: a token has one expert, and its weight is divided by itself "
            "(router_route_norm). Set [router] keep_top1_score = true"
        )
    if not COLDEST <= (end := settings.temperature.end) <= HOTTEST:
        yield (
            f"[router] temperature = {end:g}: {learns}, as float32 scores no longer depend on "
            f"its logits. Choose one between {COLDEST:g} and {HOTTEST:g}"
        )


def weight_of(weights_BLK: Tensor, ids_BLK: Tensor, first: int, last: int) -> Tensor:
    """Return weight_BL1: a token's weight for the experts ``first`` to ``last`` - 1."""
    # Experts of one kind have consecutive numbers; a comparison needs no table of kinds.
    chosen_BLK = (ids_BLK >= first) & (ids_BLK < last)
    return torch.where(chosen_BLK, weights_BLK, 0).sum(-1, keepdim=True)


def constant_output(
    x_BLD: Tensor, weight_BLC: Tensor, mix_C2D: Tensor, vectors_CD: Tensor
) -> Tensor:
    """Return y_BLD: the sum of the constant experts' outputs, each times its weight.

    Expert c outputs ``a x + b v_c`` with ``(a, b) = softmax(mix_c x)``.
    """
    # MoE++, equation 5: the token itself decides how much of it and how much of v_c goes on.
    mix_BLC2 = torch.einsum("...d,cmd->...cm", x_BLD, mix_C2D.to(x_BLD.dtype)).softmax(-1)
    shares_BLC2 = weight_BLC.unsqueeze(-1) * mix_BLC2
    of_input_BL1 = shares_BLC2[..., 0].sum(-1, keepdim=True)
    # Weight the vectors first: one product [.., C] @ [C, D] instead of C outputs of [B, L, D].
    of_vectors_BLD = shares_BLC2[..., 1].to(x_BLD.dtype) @ vectors_CD.to(x_BLD.dtype)
    return x_BLD * of_input_BL1.to(x_BLD.dtype) + of_vectors_BLD
