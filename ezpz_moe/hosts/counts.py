"""How many parameters a flavor's model has, where that is known without building it.

A model with dimensions is counted with arithmetic; tests compare it with the host's own models.
Of the host's models that our flavors name (``base``, and what ``[change]`` makes of it), the counts
are shipped (:mod:`.releases`).

Legend: V = vocabulary, D = model dimension, E = experts, F = hidden size of an expert.
"""

from __future__ import annotations

from itertools import pairwise

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.layer_sizes import one_or_each
from ezpz_moe.hosts.accounting import ffn_matrices
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.releases import facts, model_key


def counts_at_hand(flavor: Flavor) -> ModelSummary | None:
    """Return what :meth:`Host.summarize` would, or None where only the built model tells."""
    # They change what a token uses on average, and some have parameters of their own.
    if flavor.router.leaves_out or flavor.router.learned_scale:
        return None
    if flavor.dense_baseline_of is not None:
        return None  # its size comes from what the experts cost
    if flavor.dimensions is not None:
        return _of_size(flavor.dimensions, flavor)
    # What is known of it is a model with the host's own experts.
    if flavor.computes_otherwise or flavor.router.gating_residual:
        return None
    known = facts()
    model = known.models.get(model_key(flavor)) if known else None
    return model.summary if model else None


def _of_size(size: Dimensions, flavor: Flavor) -> ModelSummary:
    """Count the host's deepseek_v3 in this size, with the flavor's FFNs."""
    layers = size.layer_sizes.values()
    matrices, width = ffn_matrices(flavor.expert_activation), flavor.moe_latent_dim or size.dim
    per_unit = matrices * width + (matrices - 1) * flavor.expert_bias  # of F, in an expert
    experts = [of.hidden_dim * per_unit + width * flavor.expert_bias for of in layers]
    routed = sum(of.num_experts * expert for of, expert in zip(layers, experts, strict=True))
    used = sum(of.top_k * expert for of, expert in zip(layers, experts, strict=True))
    per_unit = ffn_matrices(flavor.ffn_activation) * size.dim  # in FFNs of every token
    shared = sum(size.shared_width(of.hidden_dim) * per_unit for of in layers)
    shared += len(layers) * size.dim * size.shared_gate
    projections = len(layers) * 2 * size.dim * (flavor.moe_latent_dim or 0)
    gates = sum((size.dim + size.router_bias) * of.num_experts for of in layers)
    if flavor.router.gating_residual:  # maps the logits of one layer with experts to the next
        gates += sum(of.num_experts * to.num_experts for of, to in pairwise(layers))
    dense = (size.n_layers - len(layers)) * per_unit * size.dense_hidden_dim
    norms = (2 * size.n_layers + 1) * size.dim
    embedding = size.vocab_size * size.dim  # and as much in the output matrix
    rest = size.n_layers * _attention(size) + dense + gates + projections + shared + norms
    total = 2 * embedding + rest + routed
    sizes = map(one_or_each, zip(*layers, strict=True)) if layers else (0, 0, 0)
    num_experts, top_k, hidden_dim = sizes
    return ModelSummary(
        dim=size.dim,
        n_layers=size.n_layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_hidden_dim=hidden_dim,
        total=total,
        active=total - routed + used,
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
