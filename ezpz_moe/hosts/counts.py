"""How many parameters a flavor's model has, where that is known without building it.

A model with dimensions is counted with arithmetic; tests compare it with the host's own models.
Of the host's models that our flavors name (``base``), the counts are shipped (:mod:`.releases`).

Legend: V = vocabulary, D = model dimension, E = experts, F = hidden size of an expert.
"""

from __future__ import annotations

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.accounting import FFN_MATRICES
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.releases import facts


def counts_at_hand(flavor: Flavor) -> ModelSummary | None:
    """Return what :meth:`Host.summarize` would, or None where only the built model tells."""
    # They change what a token uses on average, and some have parameters of their own.
    if flavor.router.zero_computation_experts:
        return None
    if flavor.dense_baseline_of is not None:
        return None  # its size comes from what the experts cost
    if flavor.dimensions is not None:
        return _of_size(flavor.dimensions)
    if flavor.change is not None:
        return None  # the shipped counts are the base's
    known = facts()
    model = known.models.get(str(flavor.base)) if known else None
    return model.summary if model else None


def _of_size(size: Dimensions) -> ModelSummary:
    """Count the host's deepseek_v3 in this size."""
    expert = FFN_MATRICES * size.dim * size.moe_hidden_dim
    moe_layers = size.n_layers - size.n_dense_layers
    routed = moe_layers * size.num_experts * expert
    gate = (size.dim + size.router_bias) * size.num_experts
    moe = gate + size.num_shared_experts * expert  # beside the routed ones
    dense = FFN_MATRICES * size.dim * size.dense_hidden_dim
    norms = (2 * size.n_layers + 1) * size.dim
    embedding = size.vocab_size * size.dim  # and as much in the output matrix
    rest = size.n_layers * _attention(size) + size.n_dense_layers * dense + moe_layers * moe + norms
    total = 2 * embedding + rest + routed
    has_experts = moe_layers > 0  # a dense model shows none
    return ModelSummary(
        dim=size.dim,
        n_layers=size.n_layers,
        num_experts=size.num_experts * has_experts,
        top_k=size.router_top_k * has_experts,
        expert_hidden_dim=size.moe_hidden_dim * has_experts,
        total=total,
        active=total - routed + routed * size.router_top_k // size.num_experts,
        embedding=embedding,
    )


def _attention(size: Dimensions) -> int:
    """Count one layer's attention: multi-head latent attention (arXiv 2405.04434)."""
    query = size.n_heads * (size.qk_nope_head_dim + size.qk_rope_head_dim)
    rank = size.q_lora_rank  # 0: queries are not compressed, and have no norm in between
    queries = size.dim * rank + rank + rank * query if rank else size.dim * query
    latent = size.kv_lora_rank
    keys_values = size.dim * (latent + size.qk_rope_head_dim) + latent
    keys_values += latent * size.n_heads * (size.qk_nope_head_dim + size.v_head_dim)
    return queries + keys_values + size.n_heads * size.v_head_dim * size.dim
