"""What kernels do with a tile in registers, in float32: biases, activations and their derivatives.

:mod:`ezpz_moe.compute.activations` says which formulas these are. Comparisons are written so that
NaN fails them and stays NaN.
"""

import triton
import triton.language as tl

from ezpz_moe.compute.activations import CLAMP_ALPHA, CLAMP_LIMIT

ALPHA, LIMIT = tl.constexpr(CLAMP_ALPHA), tl.constexpr(CLAMP_LIMIT)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """Return ``act(gate)``."""
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate)
    elif ACTIVATION == "clamped_swiglu":  # noqa: RET505 - Triton compiles what follows a return
        clamped = tl.where(gate > LIMIT, LIMIT, gate)
        return clamped * tl.sigmoid(clamped * ALPHA)
    elif ACTIVATION == "reglu":
        return tl.where(gate < 0, 0.0, gate)
    elif ACTIVATION == "relu2":
        return tl.where(gate < 0, 0.0, gate * gate)
    else:
        tl.static_assert(ACTIVATION == "geglu" or ACTIVATION == "gelu")
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def slope(gate, ACTIVATION: tl.constexpr):
    """Return the derivative of :func:`activated`."""
    if ACTIVATION == "swiglu":
        # silu(g) = g s(g), so silu'(g) = s + g s (1 - s), with s the sigmoid.
        sigmoid = tl.sigmoid(gate)
        return sigmoid + gate * sigmoid * (1.0 - sigmoid)
    elif ACTIVATION == "clamped_swiglu":  # noqa: RET505
        sigmoid = tl.sigmoid(gate * ALPHA)
        slope = sigmoid + gate * ALPHA * sigmoid * (1.0 - sigmoid)
        return tl.where(gate > LIMIT, 0.0, slope)
    elif ACTIVATION == "reglu":
        return tl.where(gate <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        return tl.where(gate <= 0, 0.0, 2.0 * gate)
    else:
        # The normal distribution, and g times its density.
        distribution = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        return distribution + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)


@triton.jit
def factor(up, ACTIVATION: tl.constexpr):
    """Return what of up multiplies ``act(gate)``."""
    if ACTIVATION == "clamped_swiglu":
        up = tl.where(up > LIMIT, LIMIT, up)
        up = tl.where(up < -LIMIT, -LIMIT, up) + 1.0
    return up


@triton.jit
def through_factor(grad, up, ACTIVATION: tl.constexpr):
    """Return a gradient times the derivative of :func:`factor`."""
    if ACTIVATION == "clamped_swiglu":
        grad = tl.where(tl.abs(up) > LIMIT, 0.0, grad)
    return grad


@triton.jit
def bias(B, expert, columns, E, N):
    """Return the expert's bias in these columns, float32; the tail has none."""
    at = B + expert.to(tl.int64) * N + columns  # contiguous
    return tl.load(at, (columns < N) & (expert < E), other=0.0).to(tl.float32)


@triton.jit
def halves(tile):
    """Split a tile's columns into the left and the right half."""
    pairs = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))
