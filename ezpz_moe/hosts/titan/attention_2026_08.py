"""Compute causal SDPA on a host that folds batch and sequence into one dimension of tokens.

The host's own SDPA class still expects [B, L, N, H]. It would silently accept a folded [T, N, H],
and tokens would attend across heads. Here the tokens are cut into sequences again.

Legend of the suffixes: T = tokens (B L), otherwise :mod:`ezpz_moe.hosts.titan.attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchtitan.models.common.attention import BaseAttention

from ezpz_moe.hosts.titan import attention as unfolded


class CausalAttention(unfolded.CausalAttention):
    """Causal attention within every ``context_length`` tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(unfolded.CausalAttention.Config):
        context_length: int
        """Tokens per sequence; the number of tokens is a multiple of it, or smaller."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.context_length = config.context_length

    def forward(  # type: ignore[override]
        self,
        q_TNH: torch.Tensor,
        k_TNH: torch.Tensor,
        v_TNH: torch.Tensor,
        *,
        out_transform: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Compute causal attention, and apply ``out_transform(out_TNH, lse_TN)`` to the result."""
        # A microbatch may be shorter than a sequence. `own_conflicts` has refused other remainders.
        length = min(self.context_length, q_TNH.shape[0])

        # The model's transform expects tokens, the parent's expects sequences.
        def on_tokens(out_BLNH: torch.Tensor, lse_BLN: torch.Tensor) -> torch.Tensor:
            assert out_transform is not None
            out_TNH = out_transform(out_BLNH.flatten(0, 1), lse_BLN.flatten(0, 1))
            return out_TNH.unflatten(0, (-1, length))

        out_BLNH = super().forward(
            *(each.unflatten(0, (-1, length)) for each in (q_TNH, k_TNH, v_TNH)),
            out_transform=None if out_transform is None else on_tokens,
            **kwargs,
        )
        return out_BLNH.flatten(0, 1)


def causal_attention(config: BaseAttention.Config) -> CausalAttention.Config:
    """Return the config of :class:`CausalAttention` that replaces ``config.inner_attention``.

    Under door 2 the host has already set the RoPE's length to that of training. For a job,
    ``Titan2026_08.fit_model`` sets it later.
    """
    return CausalAttention.Config(
        left_window=unfolded.left_window(config), context_length=config.rope.max_context_length
    )
