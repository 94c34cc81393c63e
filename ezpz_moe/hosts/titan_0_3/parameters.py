"""Parameters of a flavor, counted on the model itself, built on the meta device.

The counts follow the host's ``get_nparams_and_flops``: *active* are the parameters that one token
meets, namely k/E of each layer's routed experts and all of everything else, both embedding
matrices included.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torchtitan.models.common.moe import MoE

from ezpz_moe.flavors import Flavor
from ezpz_moe.hosts import binding
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.titan_0_3.models import model_spec


def summarize(flavor: Flavor) -> ModelSummary:
    """Dimensions and parameter counts of the flavor's model.

    Variants of one size are built once: neither attention nor backend has parameters of its own.

    Raises:
        EzpzError: the host cannot build the model.
    """
    return _summarize(
        flavor.model_copy(
            update={
                "name": flavor.source.stem,
                "attention": None,
                "compute_backend": "grouped_mm",
            }
        )
    )


def build_on_meta(flavor: Flavor) -> nn.Module:
    """The flavor's model. No memory is allocated for it."""
    with torch.device("meta"):
        return model_spec(flavor).model.build()


@cache
def _summarize(flavor: Flavor) -> ModelSummary:
    config = model_spec(flavor).model
    model: Any = build_on_meta(flavor)
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    # Each expert is one slice of the same size, so k/E of a layer's parameters is a whole number.
    idle = sum(
        _numel(moe.routed_experts)
        // moe.router.num_experts
        * (moe.router.num_experts - moe.router.top_k)
        for moe in moes
    )
    total = _numel(model)
    host_experts = binding("experts")
    _, experts, _, _ = next(config.traverse(host_experts.HostExperts.Config))
    sizes = host_experts.sizes(experts)
    return ModelSummary(
        dim=config.dim,
        n_layers=len(config.layers),
        num_experts=sizes.num_experts,
        top_k=moes[0].router.top_k,
        expert_hidden_dim=sizes.hidden_dim,
        total=total,
        active=total - idle,
        embedding=_numel(model.tok_embeddings),
    )


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
