"""Describe what a model computes, in numbers and words of no host.

``ckpt remap --to hf`` writes a ``config.json`` from it. It holds what decides the logits, and not
how they are computed: neither backends nor attention kernels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Attributes:
        longest: how many positions a sequence may have.
        theta: base of the wavelengths.
        scaling: "none", "yarn", or another name of the host's.
        factor, beta_fast, beta_slow, original, truncate: YaRN's.
    """

    longest: int
    theta: float
    scaling: str
    factor: float
    beta_fast: float
    beta_slow: float
    original: int
    truncate: bool

    @property
    def is_scaled(self) -> bool:
        return self.scaling != "none" and not (self.scaling == "yarn" and self.factor <= 1)


@dataclass(frozen=True)
class Latent:
    """What multi-head latent attention has besides heads; the scores' ``mscale`` is YaRN's."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    mscale: float


@dataclass(frozen=True)
class Attention:
    """Attention of a layer.

    Attributes:
        head_dim: of queries and keys; with latent attention, of their rotated part.
        norm_eps: of the norms of queries, keys or latents; empty if there are none.
        window: how many tokens a token attends to, itself included; None for all.
        latent: None for grouped-query attention.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: tuple[float, ...]
    window: int | None
    latent: Latent | None
    rope: Rope


@dataclass(frozen=True)
class Experts:
    """Mixture of experts of a layer.

    Attributes:
        hidden: inner dimension of a routed expert.
        shared_hidden: of all shared experts together; 0 without them.
        groups, limited_groups: a token's experts lie in ``limited_groups`` of ``groups``; None
            without a limit.
        group_score: what ranks the groups, as in a flavor.
        swiglu_limit: where the experts clamp their activation; None if they do not.
    """

    number: int
    hidden: int
    shared_hidden: int
    top_k: int
    score_func: str
    route_norm: bool
    route_scale: float
    groups: int | None
    limited_groups: int | None
    group_score: str
    swiglu_limit: float | None


@dataclass(frozen=True)
class Layer:
    """A layer, with experts or with a dense FFN; ``norm_eps`` of its two norms."""

    attention: Attention
    norm_eps: tuple[float, ...]
    dense_hidden: int | None
    experts: Experts | None


@dataclass(frozen=True)
class Architecture:
    """A decoder.

    Attributes:
        family: the host's name for models of this kind, such as "deepseek_v3".
        norm_eps: of the last norm.
        tied: whether embedding and output share their weight.
        besides: parts that a decoder of this family need not have, in words.
    """

    family: str
    vocab_size: int
    dim: int
    layers: tuple[Layer, ...]
    norm_eps: float
    tied: bool
    besides: tuple[str, ...] = ()
