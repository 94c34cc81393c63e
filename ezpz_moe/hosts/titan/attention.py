"""Attention for devices where FlexAttention and varlen attention do not train.

These are XPU, CPU and old GPUs. torchtitan 0.3 no longer offers SDPA for language models, because
SDPA takes no per-document mask, but its class still exists. With it, attention is causal over the
whole packed sequence.

Legend of the suffixes: B = batch, L = sequence length (S on the key side), N = heads,
G = query heads per key head, H = head dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torchtitan.models.common.attention import (
    BaseAttention,
    FlexAttention,
    ScaledDotProductAttention,
    VarlenAttention,
)

from ezpz_moe.hosts.titan.base import titan

MASKED_ATTENTION = (FlexAttention.Config, VarlenAttention.Config)
"""The host's attention kernels for language models. Neither has a backward on the CPU."""


class CausalAttention(ScaledDotProductAttention):
    """SDPA; if the model needs the log-sum-exp or a window, the same attention written out.

    gpt_oss rescales the output by its attention sinks. For that it needs the log-sum-exp, which
    ``F.scaled_dot_product_attention`` does not return. The host's SDPA class would silently ignore
    the request. The written-out form holds the [B, N, L, L] scores in memory.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        left_window: int = -1
        """How many earlier tokens a token attends to; -1 means all of them."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.left_window = config.left_window

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Compute causal attention, and apply ``out_transform(out_BLNH, lse_BLN)`` to it."""
        if not self.holds_scores(out_transform):
            return super().forward(
                q_BLNH, k_BLNH, v_BLNH, scale=scale, enable_gqa=enable_gqa, **kwargs
            )
        out_BLNH, lse_BLN = _attention_with_lse(
            q_BLNH, k_BLNH, v_BLNH, scale=scale, left_window=self.left_window
        )
        return out_BLNH if out_transform is None else out_transform(out_BLNH, lse_BLN)

    def holds_scores(self, out_transform: object = None, **_: object) -> bool:
        """Return whether a call with these arguments is written out."""
        return out_transform is not None or self.left_window >= 0


def has_masked_attention(model_spec) -> bool:
    """Return whether the model attends to tokens with one of these kernels."""
    return any(True for _ in _masked(model_spec))


def use_sdpa(model_config) -> int:
    """Replace the kernel of every masked attention below ``model_config``, in place.

    Returns:
        The number of attentions that were changed.
    """
    # A list: the tree must not change while it is being traversed.
    attentions = list(_masked(model_config))
    for config in attentions:
        # Asked of the host: with folded tokens it has another class for this.
        config.inner_attention = titan().causal_attention(config)
    return len(attentions)


def _masked(model) -> Iterator[BaseAttention.Config]:
    # A vision encoder has such a kernel too, in a class of its own: text never calls it.
    for _, config, _, _ in model.traverse(BaseAttention.Config):
        if isinstance(config.inner_attention, MASKED_ATTENTION):
            yield config


def causal_attention(config: BaseAttention.Config) -> CausalAttention.Config:
    """Return the config of :class:`CausalAttention` that replaces ``config.inner_attention``."""
    return CausalAttention.Config(left_window=left_window(config))


def left_window(config: BaseAttention.Config) -> int:
    """Return how many earlier tokens the model lets a token attend to; -1 means all of them.

    The window is a field of the attention and not of its kernel. FlexAttention gets it through the
    mask, and no mask is built for SDPA.
    """
    # The model's window includes the token itself, ours does not.
    window = getattr(config, "sliding_window_size", None)
    return -1 if window is None else window - 1


def _attention_with_lse(
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    *,
    scale: float | None,
    left_window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute causal softmax attention in float32, and the log-sum-exp of its scores."""
    L, N, H = q_BLNH.shape[1:]
    G = N // k_BLNH.shape[2]
    # Written out, every query head needs keys of its own: einsum has no grouped queries.
    k_BLNH, v_BLNH = (t.repeat_interleave(G, dim=2) for t in (k_BLNH, v_BLNH))
    scale = H**-0.5 if scale is None else scale
    # float32, as in fused kernels: in bfloat16 the log-sum-exp would keep 8 bits, and gpt_oss
    # rescales the output with it.
    scores_BNLS = torch.einsum("blnh,bsnh->bnls", q_BLNH.float(), k_BLNH.float()) * scale
    distance_LS = torch.arange(L, device=q_BLNH.device).unsqueeze(1) - torch.arange(
        L, device=q_BLNH.device
    )
    hidden_LS = distance_LS < 0
    if left_window >= 0:
        hidden_LS |= distance_LS > left_window
    scores_BNLS = scores_BNLS.masked_fill(hidden_LS, float("-inf"))
    # A token always sees itself, so no row is -inf throughout, which would give NaN.
    lse_BNL = torch.logsumexp(scores_BNLS, dim=-1)
    # Back to the model's dtype for the second product, as fused kernels do.
    weights_BNLS = torch.exp(scores_BNLS - lse_BNL.unsqueeze(-1)).to(v_BLNH.dtype)
    out_BLNH = torch.einsum("bnls,bsnh->blnh", weights_BNLS, v_BLNH)
    return out_BLNH, lse_BNL.transpose(1, 2)
