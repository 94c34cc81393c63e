"""Count a flavor's parameters on the model itself, built on the meta device.

*Active* are the parameters that one token uses: k/E of each layer's routed experts and all of
everything else, including both embedding matrices.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torchtitan.models.moe import MoE

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.titan_0_2.models import build_model, model_args


def summarize(flavor: Flavor) -> ModelSummary:
    """Return the dimensions and parameter counts of the flavor's model.

    It builds variants of one size once: neither attention nor backend has parameters of its own.

    Raises:
        EzpzError: the host cannot build the model.
    """
    # The flavor is the key of the cache: what does not change the size gets one value for all.
    size = {"name": flavor.source.stem, "attention": None, "compute_backend": "grouped_mm"}
    return _summarize(flavor.model_copy(update=size))


def build_on_meta(flavor: Flavor) -> nn.Module:
    """Build the flavor's model without allocating memory for it."""
    args: Any = model_args(flavor)
    args.moe_impl = "standard"  # the host sets this from the job, and there is none here
    with torch.device("meta"):
        return build_model(args)


@cache
def _summarize(flavor: Flavor) -> ModelSummary:
    args: Any = model_args(flavor)
    model: Any = build_on_meta(flavor)
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    # Experts are slices of equal size, so E divides a layer's parameters.
    idle = sum(
        _numel(moe.experts) // moe.router.num_experts * (moe.router.num_experts - moe.router.top_k)
        for moe in moes
    )
    total = _numel(model)
    return ModelSummary(
        dim=args.dim,
        n_layers=args.n_layers,
        num_experts=args.moe_args.num_experts,
        top_k=args.moe_args.top_k,
        expert_hidden_dim=_expert_hidden_dim(moes[0].experts),
        total=total,
        active=total - idle,
        embedding=_numel(model.tok_embeddings),
    )


def _expert_hidden_dim(experts: Any) -> int:
    # gpt_oss has other names, and gate and up in one matrix: only the last projection has F alone.
    down = experts.w2 if hasattr(experts, "w2") else experts.mlp2_weight  # [E, D, F]
    return down.shape[-1]


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
