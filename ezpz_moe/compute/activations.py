"""What stands between the products of an expert FFN: SwiGLU and its relatives.

With a gate, the hidden rows are ``act(x @ w1.T) * factor(x @ w3.T)``. Without one they are
``act(x @ w1.T)``, and there is no w3.

Every formula is here twice: as torch writes it, for autograd; and in place with its derivative, for
the kernels in :mod:`.ffn`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLAMP_LIMIT = 7.0
"""Where ``clamped_swiglu`` cuts off, as gpt_oss does: gate above it, up on both sides."""
CLAMP_ALPHA = 1.702
"""The slope in ``clamped_swiglu``: ``g * sigmoid(1.702 g)`` is close to GELU."""


@dataclass(frozen=True)
class Activation:
    """The elementwise part of an expert FFN.

    Attributes:
        name: what ``activation`` says.
        is_gated: whether there is a product with w3 (up) beside that with w1 (gate).
        hidden: from gate and up (None without one) to the hidden rows, differentiable.
        apply: write ``act(gate)`` into the second tensor, which may be the first.
        differentiate_: multiply a gradient, the first tensor, by ``act'(gate)``, in place.
        factor: what of up multiplies ``act(gate)``; None if it is up itself.
        differentiate_factor_: multiply a gradient, the first tensor, by the derivative of
            ``factor(up)``, in place; None if that is one.
    """

    name: str
    is_gated: bool
    hidden: Callable[[Tensor, Tensor | None], Tensor]
    apply: Callable[[Tensor, Tensor], object]
    differentiate_: Callable[[Tensor, Tensor], object]
    factor: Callable[[Tensor], Tensor] | None = None
    differentiate_factor_: Callable[[Tensor, Tensor], object] | None = None


_Pointwise = Callable[[Tensor], Tensor]
_InPlace = Callable[[Tensor, Tensor], object]


def _gated(name: str, act: _Pointwise, apply: _InPlace, differentiate_: _InPlace) -> Activation:
    return Activation(name, True, lambda gate, up: act(gate) * up, apply, differentiate_)


def _ungated(name: str, act: _Pointwise, apply: _InPlace, differentiate_: _InPlace) -> Activation:
    return Activation(name, False, lambda gate, up: act(gate), apply, differentiate_)


# The out variants of aten's operators, because torch.nn.functional has no derivatives that write in
# place.
_aten = torch.ops.aten


def _silu(gate: Tensor, out: Tensor) -> None:
    _aten.silu.out(gate, out=out)


def _differentiate_silu_(grad: Tensor, gate: Tensor) -> None:
    _aten.silu_backward.grad_input(grad, gate, grad_input=grad)


def _gelu(gate: Tensor, out: Tensor) -> None:
    _aten.gelu.out(gate, out=out)


def _differentiate_gelu_(grad: Tensor, gate: Tensor) -> None:
    _aten.gelu_backward.grad_input(grad, gate, grad_input=grad)


def _relu(gate: Tensor, out: Tensor) -> None:
    torch.clamp_min(gate, 0, out=out)


def _differentiate_relu_(grad: Tensor, gate: Tensor) -> None:
    _aten.threshold_backward.grad_input(grad, gate, 0, grad_input=grad)


def _relu2(gate: Tensor, out: Tensor) -> None:
    torch.clamp_min(gate, 0, out=out)
    torch.square(out, out=out)


def _differentiate_relu2_(grad: Tensor, gate: Tensor) -> None:
    grad.mul_(gate.clamp_min(0)).mul_(2)


def _clamped_hidden(gate: Tensor, up: Tensor | None) -> Tensor:
    assert up is not None  # the arguments were checked
    gate = gate.clamp(max=CLAMP_LIMIT)
    return gate * torch.sigmoid(CLAMP_ALPHA * gate) * _clamped_factor(up)


def _clamped_factor(up: Tensor) -> Tensor:
    return up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT).add_(1)


def _clamped_gate(gate: Tensor, out: Tensor) -> None:
    gate = gate.clamp(max=CLAMP_LIMIT)
    torch.mul(gate, (gate * CLAMP_ALPHA).sigmoid_(), out=out)


def _differentiate_clamped_gate_(grad: Tensor, gate: Tensor) -> None:
    # (g s(a g))' = s + a g s (1 - s), with s the sigmoid and a its slope. In float32 where rows are
    # in half of it: as in torch's own derivatives there is then one rounding, not one per step.
    wider = gate.to(torch.promote_types(gate.dtype, torch.float32))
    slope = (wider * CLAMP_ALPHA).sigmoid_()
    slope *= 1 + CLAMP_ALPHA * wider * (1 - slope)
    # Fill, do not multiply by zero: beyond the limit nothing arrives, not even an infinity.
    grad.copy_(slope.mul_(grad).masked_fill_(gate > CLAMP_LIMIT, 0))


def _differentiate_clamped_factor_(grad: Tensor, up: Tensor) -> None:
    grad.masked_fill_(up.abs() > CLAMP_LIMIT, 0)


ACTIVATIONS = {
    each.name: each
    for each in (
        _gated("swiglu", F.silu, _silu, _differentiate_silu_),
        # The exact GELU, of the error function, and not the approximation by tanh.
        _gated("geglu", F.gelu, _gelu, _differentiate_gelu_),
        _gated("reglu", F.relu, _relu, _differentiate_relu_),
        Activation(
            "clamped_swiglu",
            True,
            _clamped_hidden,
            _clamped_gate,
            _differentiate_clamped_gate_,
            _clamped_factor,
            _differentiate_clamped_factor_,
        ),
        _ungated("relu2", lambda gate: F.relu(gate).square(), _relu2, _differentiate_relu2_),
        _ungated("gelu", F.gelu, _gelu, _differentiate_gelu_),
    )
}
"""What ``activation`` may say."""
