"""FFNs that the host's models do not have: with another activation, or with a gate.

Dense layers and shared experts are the host's ``FeedForward``, a SwiGLU. Here its nodes are
replaced in a model's config, so that parameters keep the host's names: ``w1``, ``w2`` and, if the
activation has a gate, ``w3``. Routed experts are in ``experts.py`` of each generation.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`; X = whatever is before the last dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
)
from torchtitan.models.common.feed_forward import FeedForward, SigmoidGatedFeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.config.flavor_schema import Activation, Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.ffns import dense_ffns
from ezpz_moe.hosts.titan.mixed import written_name


class ActivatedFeedForward(FeedForward):
    """``FeedForward`` with another activation. Without a gate it has no ``w3``."""

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        activation: Activation

    def __init__(self, config: Config):
        # Not the host's __init__, which builds w3. Its node stays, as the host sets its sharding.
        Module.__init__(self)
        self.activation = ACTIVATIONS[config.activation]
        self.w1 = config.w1.build()
        self.w2 = config.w2.build()
        self.w3 = config.w3.build() if self.activation.is_gated else None

    def forward(self, x: Tensor) -> Tensor:
        up_XF = None if self.w3 is None else self.w3(x)
        return self.w2(self.activation.hidden(self.w1(x), up_XF))


class GatedFeedForward(SigmoidGatedFeedForward):
    """``SigmoidGatedFeedForward``, whose gate the host shards only in the model that has one."""

    @dataclass(kw_only=True, slots=True)
    class Config(SigmoidGatedFeedForward.Config):
        pass

    def parallelize(self, parallel_dims: Any) -> None:
        """Let every rank of a tensor-parallel group compute the whole gate, then as the host."""
        output = self.w2._sharding_config
        if output is not None and self.gate._sharding_config is None:
            whole, output = dense_param_placement(tp=spmd.R), output.out_dst_shardings
            # Which context parallelism splits: the second of [B, L, D], and the first of [T, D].
            tokens = len(titan().one_sequence(1)) - 1
            self.gate._sharding_config = ShardingConfig(
                state_shardings={"weight": whole, "bias": whole},
                out_src_shardings=dense_activation_placement(tp=spmd.R, cp=spmd.S(tokens)),
                # As the FFN's output that it multiplies.
                out_dst_shardings=output,
            )
        super().parallelize(parallel_dims)


class ActivatedGatedFeedForward(GatedFeedForward, ActivatedFeedForward):
    """:class:`GatedFeedForward` with another activation."""

    @dataclass(kw_only=True, slots=True)
    class Config(GatedFeedForward.Config):
        activation: Activation


_ACTIVATED: dict[type, Any] = {
    FeedForward: ActivatedFeedForward,
    SigmoidGatedFeedForward: ActivatedGatedFeedForward,
    GatedFeedForward: ActivatedGatedFeedForward,
}
"""A class of FFNs -> the same with an activation of its own."""


def set_ffns(model: Any, flavor: Flavor) -> None:
    """Give the model's FFNs the flavor's activations, biases and gates, in place.

    The experts have a selector by now: it decides who computes them.

    Raises:
        EzpzError: the host's experts or FFNs compute a formula of their own, or the model has no
            FFN that a key is about.
    """
    if flavor.dimensions and flavor.dimensions.shared_gate:
        _add_gates(model)
    if flavor.ffn_activation != "swiglu":
        _set_dense(model, flavor)
    if flavor.expert_activation != "swiglu" or flavor.expert_bias:
        experts = titan().experts()
        for _, node, parent, attribute in list(model.traverse(experts.HostExperts.Config)):
            other = experts.computing(
                node, flavor.expert_activation, flavor.expert_bias, str(flavor.source)
            )
            setattr(parent, attribute, other)


def _add_gates(model: Any) -> None:
    for moe in (layer.moe for layer in model.layers if layer.moe is not None):
        w1 = moe.shared_experts.w1
        gate = Linear.Config(in_features=w1.in_features, out_features=1, param_init=w1.param_init)
        moe.shared_experts = derive(moe.shared_experts, GatedFeedForward.Config, gate=gate)


def _set_dense(model: Any, flavor: Flavor) -> None:
    said = f"{flavor.source}: ffn_activation = {flavor.ffn_activation!r}"
    nodes = list(dense_ffns(model))
    if not nodes:
        raise EzpzError(
            f"{said} has no effect: this model has neither dense layers nor shared experts. "
            "Remove it."
        )
    for parent, attribute in nodes:
        node = getattr(parent, attribute)
        host_class = type(node)._owner
        if host_class not in _ACTIVATED:
            raise EzpzError(
                f"{said}: {written_name(host_class)}, which this model has, computes an FFN of its "
                "own. Remove it."
            )
        activated = _ACTIVATED[host_class].Config
        setattr(parent, attribute, derive(node, activated, activation=flavor.ffn_activation))
