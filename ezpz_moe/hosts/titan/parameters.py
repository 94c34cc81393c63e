"""Count a flavor's parameters on the model itself, built on the meta device.

The counts follow the host's ``get_nparams_and_flops``. *Active* are the parameters that one token
uses: k/E of each layer's routed experts and all of everything else, including both embedding
matrices. With zero-computation experts they are an average.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.layer_sizes import one_or_each
from ezpz_moe.hosts.accounting import Cost
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.components import choices, weigh
from ezpz_moe.hosts.titan.models import model_spec


def summarize(flavor: Flavor) -> ModelSummary:
    """Return the dimensions and parameter counts of the flavor's model.

    It builds variants of one size once: neither attention nor backend has parameters of its own.

    Raises:
        EzpzError: the host cannot build the model.
    """
    return _summarize(
        # The flavor is the key of the cache: what does not change the size gets one value for all.
        flavor.model_copy(
            update={
                "name": flavor.source.stem,
                "attention": None,
                "compute_backend": "grouped_mm",
                "expert_precision": None,
            }
        )
    )


def build_on_meta(flavor: Flavor) -> nn.Module:
    """Build the flavor's model without allocating memory for it."""
    with torch.device("meta"):
        return model_spec(flavor).model.build()


@cache
def _summarize(flavor: Flavor) -> ModelSummary:
    config = model_spec(flavor).model
    chosen = choices(config, flavor)
    costs, _ = weigh(build_on_meta(flavor))
    total = sum(costs.values(), Cost())
    host_experts = titan().experts()
    # A dense model has none.
    nodes = config.traverse(host_experts.HostExperts.Config)
    hidden_dims = [host_experts.sizes(node).hidden_dim for _, node, _, _ in nodes] or [0]
    return ModelSummary(
        dim=config.dim,
        n_layers=len(config.layers),
        num_experts=chosen.num_experts,
        top_k=chosen.top_k,
        expert_hidden_dim=one_or_each(hidden_dims),
        total=total.parameters,
        # A fraction only with zero-computation experts.
        active=round(total.active),
        embedding=costs["embeddings"].parameters,
    )
