"""Experts that work in a latent narrower than the model: ``moe_latent_dim``.

One matrix takes a token down before it is dispatched, and one takes the experts' sum up again:

    out = ascend(sum of the chosen experts' outputs for descend(x))

So experts and all-to-all have rows of the latent's width (BigMac, arXiv 2502.16927). Both matrices
are the host's linears beside the experts, in the node of the routed layer: whatever the layer is, a
node of its own or composed, it becomes one of the latent's width between them. No module is added
around it, as the host's FSDP looks for ``moe.routed_experts.inner_experts``.

Legend of the suffixes: X = whatever is before the last dimension, D = model, Z = latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any

import spmd_types as spmd
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import MoE, RoutedExperts
from torchtitan.protocols.sharding import ShardingConfig

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.mixed import named_after, written_name


def set_latent(model: Any, flavor: Flavor) -> None:
    """Have every routed layer of a model's config compute in the flavor's latent, in place.

    The layers have their backend, and what a router leaves out of them, by now.

    Raises:
        EzpzError: the host's layers or experts have no such place, or experts return the token.
    """
    said = f"{flavor.source}: moe_latent_dim = {flavor.moe_latent_dim}"
    if flavor.router.copy_experts or flavor.router.constant_experts:
        raise EzpzError(
            f"{said}: [router] copy_experts and constant_experts add the token itself, which the "
            "experts' layer then has in its latent alone. Remove them, or moe_latent_dim."
        )
    for _, moe, _, _ in model.traverse(MoE.Config):
        _refuse_others(moe.routed_experts, said)
        moe.routed_experts = _latent(moe.routed_experts, model.dim, flavor.moe_latent_dim)


def _refuse_others(config: RoutedExperts.Config, said: str) -> None:
    if not hasattr(config, "inner_experts"):
        raise EzpzError(
            f"{said}: this torchtitan's routed layer is its experts, with no place for a matrix "
            "before or after them. Remove it, or install torchtitan 0.3."
        )
    if not isinstance(config.inner_experts, titan().experts().EzpzGroupedExperts.Config):
        raise EzpzError(
            f"{said}: the experts of this model "
            f"({written_name(type(config.inner_experts)._owner)}) compute an FFN of their own. "
            "Remove it, or choose a model with torchtitan's GroupedExperts."
        )


def _latent(config: RoutedExperts.Config, dim: int, latent_dim: int | None) -> RoutedExperts.Config:
    """Return the config of the same layer with its experts in a latent."""
    experts = replace(config.inner_experts, dim=latent_dim)
    values = titan().experts().initial_values(experts)
    assert values is not None  # experts of the host's have them
    of_gate, of_down, _ = values
    dispatcher = config.token_dispatcher
    if getattr(dispatcher, "hidden_dim", None) is not None:  # what it allocates buffers for
        dispatcher = replace(dispatcher, hidden_dim=latent_dim)
    return derive(
        config,
        _with_projections(type(config)._owner).Config,
        inner_experts=experts,
        token_dispatcher=dispatcher,
        descend=_linear(dim, latent_dim, of_gate),
        # As an expert's last matrix: the host scales what writes into the residual stream by depth.
        ascend=_linear(latent_dim, dim, of_down),
    )


def _linear(of: int | None, to: int | None, draw: Any) -> Linear.Config:
    return Linear.Config(in_features=of, out_features=to, param_init={"weight": draw})


@cache
def _with_projections(host_class: type[RoutedExperts]) -> Any:
    """Return ``host_class`` between two matrices. Cached: layers of one class stay of one class."""

    class Latent(host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            descend: Linear.Config
            ascend: Linear.Config

        def __init__(self, config: Config):
            super().__init__(config)
            self.descend = config.descend.build()
            self.ascend = config.ascend.build()

        # The host looks up the shardings of inputs by the names of its own parameters.
        @wraps(host_class.forward)
        def forward(self, x_XD: Tensor, *routing: Tensor) -> Tensor:
            return self.ascend(super().forward(self.descend(x_XD), *routing))

        def parallelize(self, parallel_dims: Any) -> None:
            """Let the host wrap the layer between the matrices, which stay outside."""
            _shard(self)
            layer: Any = self  # what the host wraps is an attribute of the instance
            layer.forward = super().forward
            super().parallelize(parallel_dims)
            routed = layer.forward

            def forward(x_XD: Tensor, *routing: Tensor) -> Tensor:
                return self.ascend(routed(self.descend(x_XD), *routing))

            layer.forward = forward

    return named_after(Latent, host_class)


def _shard(layer: Any) -> None:
    """Lay out both matrices, in place: each rank has all of them, for the tokens that it has.

    The layer's own inputs and outputs say which those are. What it would redistribute at its input
    is redistributed before the first matrix.
    """
    of_layer: ShardingConfig | None = layer._sharding_config
    if of_layer is None:
        return
    name = layer._cache_pos_arg_names()[0]
    sources = dict(of_layer.in_src_shardings or {})
    tokens = (of_layer.in_dst_shardings or {})[name]
    layer.descend._sharding_config = _whole(sources[name], tokens)
    layer._sharding_config = replace(of_layer, in_src_shardings={**sources, name: tokens})
    outputs = of_layer.out_dst_shardings
    layer.ascend._sharding_config = _whole(outputs, outputs)


def _whole(source: Any, tokens: Any) -> ShardingConfig:
    return ShardingConfig(
        state_shardings={"weight": dense_param_placement(tp=spmd.R)},
        in_src_shardings={"input": source},
        in_dst_shardings={"input": tokens},
        out_src_shardings=tokens,
        out_dst_shardings=tokens,
    )
