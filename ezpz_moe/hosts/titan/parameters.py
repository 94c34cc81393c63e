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
from ezpz_moe.hosts.accounting import Cost
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.titan.base import Sizes, titan
from ezpz_moe.hosts.titan.components import Choices, choices_of, weigh
from ezpz_moe.hosts.titan.models import host_spec, model_spec


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
            }
        )
    )


def choices(flavor: Flavor) -> Choices:
    """Return the choices of a flavor's token: the model's own, and those that ``[router]`` adds.

    Raises:
        EzpzError: the host has no such model.
    """
    return choices_of(host_spec(flavor).model, flavor.router)


def build_on_meta(flavor: Flavor) -> nn.Module:
    """Build the flavor's model without allocating memory for it."""
    with torch.device("meta"):
        return model_spec(flavor).model.build()


@cache
def _summarize(flavor: Flavor) -> ModelSummary:
    config = model_spec(flavor).model
    chosen = choices(flavor)
    costs, _ = weigh(build_on_meta(flavor), chosen.computing_share)
    total = sum(costs.values(), Cost())
    host_experts = titan().experts()
    # The first stands for all: layers with experts have the same sizes. A dense model has none.
    nodes = config.traverse(host_experts.HostExperts.Config)
    sizes = next((host_experts.sizes(node) for _, node, _, _ in nodes), Sizes(0, config.dim, 0))
    return ModelSummary(
        dim=config.dim,
        n_layers=len(config.layers),
        num_experts=sizes.num_experts,
        top_k=chosen.top_k,
        expert_hidden_dim=sizes.hidden_dim,
        total=total.parameters,
        # A fraction only with zero-computation experts.
        active=round(total.active),
        embedding=costs["embeddings"].parameters,
    )
