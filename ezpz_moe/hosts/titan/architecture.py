"""Read what a model computes from the host's model config."""

from __future__ import annotations

from typing import Any

from ezpz_moe.config.dense_flavors import refuse_dense
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.architecture import Architecture, Attention, Experts, Latent, Layer, Rope
from ezpz_moe.hosts.titan.attention import left_window
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.models import host_spec

_SIZED = "deepseek_v3"
"""The host's family that flavors with sizes are built from."""
_FAMILIES = (_SIZED, "kimi_k2_7", "qwen3", "gpt_oss")


def architecture(flavor: Flavor) -> Architecture:
    """Return what the flavor's model computes, without its ``[router]``.

    Raises:
        EzpzError: the host cannot build it, or this binding does not know its family.
    """
    refuse_dense(flavor, "to export for a class of transformers")
    family = flavor.base.partition("/")[0] if flavor.base else _SIZED
    if family not in _FAMILIES:
        raise EzpzError(
            f"{flavor.source}: ezpz_moe knows no class of transformers that computes torchtitan's "
            f"{family}, only those for {', '.join(_FAMILIES)}."
        )
    # The host's model: what our subclasses compute otherwise is in the flavor.
    model: Any = host_spec(flavor).model
    return Architecture(
        family=family,
        vocab_size=model.vocab_size,
        dim=model.dim,
        layers=tuple(_layer(each, flavor.router_group_score) for each in model.layers),
        norm_eps=model.norm.eps,
        tied=model.enable_weight_tying,
        besides=(*_besides(model, family), *flavor.other_ffns),
    )


def grouped_experts(flavor: Flavor) -> dict[int, tuple[int, int]]:
    """Return, by layer with experts, how many they are, and in how many groups."""
    layers = enumerate(host_spec(flavor).model.layers)
    routers = ((n, each.moe.router) for n, each in layers if each.moe)
    return {n: (router.num_experts, router.num_expert_groups or 1) for n, router in routers}


def _besides(model: Any, family: str) -> list[str]:
    further = len(getattr(model, "mtp_layers", ()) or ())
    found = [f"{further} layers that predict further tokens"] if further else []
    if getattr(model, "vision_encoder", None) is not None:
        found.append("a vision tower")
    # gpt_oss's class has one too.
    if family != "gpt_oss" and any(each.moe and each.moe.router.gate.bias for each in model.layers):
        found.append("routers with a bias (router_bias)")
    return found


def _layer(layer: Any, group_score: str) -> Layer:
    dense = layer.feed_forward
    return Layer(
        attention=_attention(layer.attention),
        norm_eps=(layer.attention_norm.eps, layer.ffn_norm.eps),
        dense_hidden=dense.w1.out_features if dense is not None else None,
        experts=_experts(layer.moe, group_score) if layer.moe is not None else None,
    )


def _attention(attention: Any) -> Attention:
    window = left_window(attention)
    latent = _latent(attention) if hasattr(attention, "kv_lora_rank") else None
    norms = [getattr(attention, "qk_norm", None)]
    if latent is not None:
        # Without a rank for queries, the host's config holds a norm that is never built.
        norms = [attention.kv_norm, attention.q_norm if latent.q_lora_rank else None]
    return Attention(
        heads=attention.n_heads,
        kv_heads=getattr(attention, "n_kv_heads", None) or attention.n_heads,
        head_dim=attention.rope.dim,
        norm_eps=tuple(norm.eps for norm in norms if norm is not None),
        window=None if window < 0 else window + 1,
        latent=latent,
        rope=_rope(attention.rope),
    )


def _latent(attention: Any) -> Latent:
    return Latent(
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
        mscale=attention.mscale,
    )


def _rope(rope: Any) -> Rope:
    return Rope(
        longest=getattr(rope, titan().LONGEST),
        theta=rope.theta,
        scaling=rope.scaling,
        factor=rope.rope_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        original=rope.original_seq_len,
        truncate=rope.truncate,
    )


def _experts(moe: Any, group_score: str) -> Experts:
    router, shared = moe.router, moe.shared_experts
    experts = titan().experts()
    # The node is RoutedExperts itself since September 2026, and below it before.
    _, node, _, _ = next(moe.traverse(experts.HostExperts.Config))
    return Experts(
        number=router.num_experts,
        hidden=experts.sizes(node).hidden_dim,
        shared_hidden=shared.w1.out_features if shared is not None else 0,
        top_k=router.top_k,
        score_func=router.score_func,
        route_norm=router.route_norm,
        route_scale=router.route_scale,
        groups=router.num_expert_groups,
        limited_groups=router.num_limited_groups,
        group_score=group_score,
        swiglu_limit=getattr(node, "swiglu_limit", None),
    )
