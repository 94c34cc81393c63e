"""Causal SDPA where the host folds batch and sequence into one dimension of tokens.

The host's own SDPA class still takes [B, L, N, H] and would take a folded [T, N, H] for it without
a word, so that tokens would attend across heads. Here the tokens are cut into sequences again.

Legend of the suffixes: T = tokens (B L), otherwise :mod:`ezpz_moe.hosts.titan.attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchtitan.models.common.attention import BaseAttention

from ezpz_moe.hosts.titan import attention as unfolded


class CausalAttention(unfolded.CausalAttention):
    """Causal attention within each ``context_length`` tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(unfolded.CausalAttention.Config):
        context_length: int
        """Tokens of a sequence; the number of tokens is a multiple of it, or less."""

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
        """Causal attention; ``out_transform(out_TNH, lse_TN)`` is applied to the result."""
        length = min(self.context_length, q_TNH.shape[0])

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
    """The config of :class:`CausalAttention` that stands in for ``config.inner_attention``.

    When door 2 asks, the host has set the RoPE's length to that of training; for a job,
    ``Titan2026_08.fit_model`` does it.
    """
    return CausalAttention.Config(
        left_window=unfolded.left_window(config), context_length=config.rope.max_context_length
    )
