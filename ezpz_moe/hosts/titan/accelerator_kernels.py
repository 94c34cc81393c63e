"""Stand in for accelerator kernels on a machine without one, and save what they would save.

For tensors that have shapes but no values: nothing is computed here.

Legend of the suffixes: :mod:`ezpz_moe.hosts.titan.attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torchtitan.models.common.attention import BaseAttention

from ezpz_moe.hosts.titan.attention import MASKED_ATTENTION, CausalAttention, left_window


class AcceleratorKernels(TorchFunctionMode):
    """Makes RMSNorm one kernel, as on accelerators: it saves its input and one factor per row.

    On the CPU it consists of many operators, which save their results in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.rms_norm:
            return _fused_rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused_rms_norm(
    input: torch.Tensor,
    normalized_shape: list[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    # normalized_shape and eps do not change what is saved.
    return _FusedRMSNorm.apply(input, weight)


class _FusedRMSNorm(torch.autograd.Function):
    """Produces shapes only, for tensors that have no values."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        # The float32 tensor stands for the reciprocal root mean square, one per row.
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise NotImplementedError("only what forward leaves is looked at")


class ShapesOnly(CausalAttention):
    """Stands in for a fused kernel that cannot run here, and saves what that kernel would save.

    That is queries, keys, values, output and log-sum-exp. If the real run would use the written-out
    attention, this class runs it too, with the scores that it saves.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CausalAttention.Config):
        is_fused_always: bool

    def __init__(self, config: Config):
        super().__init__(config)
        self.is_fused_always = config.is_fused_always

    def forward(self, q_BLNH, k_BLNH, v_BLNH, *, out_transform=None, **kwargs):
        has_own_form = out_transform is not None or self.left_window >= 0
        # A model with FlexAttention has a fused kernel even with sinks or a window. One with SDPA
        # does not: there CausalAttention writes the attention out, and its scores count.
        if has_own_form and not self.is_fused_always:
            return super().forward(q_BLNH, k_BLNH, v_BLNH, out_transform=out_transform, **kwargs)
        # The one fused kernel of torch that accepts values with another head dimension (MLA).
        out_BNLH, lse_BNL, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            *(each.transpose(1, 2) for each in (q_BLNH, k_BLNH, v_BLNH)), None, True, 0.0, True
        )
        out_BLNH = out_BNLH.transpose(1, 2)
        if out_transform is None:
            return out_BLNH
        # The kernel pads the log-sum-exp to a multiple of its block size.
        return out_transform(out_BLNH, lse_BNL[..., : q_BLNH.shape[1]].transpose(1, 2))


def give_shapes_only(model_config: Any) -> None:
    """Replace the kernel of every attention below ``model_config``, in place."""
    for _, node, _, _ in model_config.traverse(BaseAttention.Config):
        is_masked = isinstance(node.inner_attention, MASKED_ATTENTION)
        if is_masked or isinstance(node.inner_attention, CausalAttention.Config):
            node.inner_attention = ShapesOnly.Config(
                left_window=left_window(node), is_fused_always=is_masked
            )
