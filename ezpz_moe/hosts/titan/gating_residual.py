"""Routers that see where a token went in the layer before: ``[router] gating_residual``.

A layer's logits are those of its gate, plus a learned map of the logits of the last layer with
experts before it:

    G_j = W_j x_j + M_j G_(j-1),    of the first layer with experts  G_1 = W_1 x_1

G are the logits before temperature, activation and scores. Gradients go through the map into the
layers before. Source: the gating residuals of MoE++, arXiv 2410.07348; its authors' code, in
github.com/SkyworkAI/MoE-plus-plus, does not detach either. Here the map begins as zero, so that a
first step is the host's.

Logits go from layer to layer as a second value beside the residual stream. No layer looks them up
in another one: a layer that is recomputed is given what it was given in forward.

Legend of the suffixes: :mod:`ezpz_moe.routing`; X = whatever is before the last dimension, P =
choices of the layer before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from torchtitan.config.override import derive
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.mixed import named_after
from ezpz_moe.routing.gate import gate_product


class _Gate(Module):
    """Mixin before a flavor's gate: adds the map of the logits of the layer before."""

    previous_XP: Tensor | None = None
    sum_XE: Tensor | None = None

    def product(self, input: Tensor) -> Tensor:
        """Return the sum; it is kept for the next layer, until the block takes it."""
        self.sum_XE = super().product(input)
        if self.residual is not None:
            self.sum_XE = self.sum_XE + self._mapped(self.previous_XP)
        return self.sum_XE

    def _mapped(self, logits_XP: Tensor) -> Tensor:
        """Return the map's product, in the precision of the gate's own."""
        product_XE = gate_product(logits_XP, self.residual.weight, None, self.settings)
        return self.residual(logits_XP) if product_XE is None else product_XE

    def parallelize(self, parallel_dims: Any) -> None:
        """Lay out the map as the gate, for the tokens whose logits this rank has."""
        of_gate = self._sharding_config
        if self.residual is not None and of_gate is not None:
            tokens = {"input": of_gate.out_dst_shardings}
            self.residual._sharding_config = replace(
                of_gate, in_src_shardings=tokens, in_dst_shardings=tokens
            )
        super().parallelize(parallel_dims)


class _Block(Module):
    """Mixin before a layer of the host: takes and gives logits beside the residual stream."""

    gives: bool

    def forward(self, x: Any, *inputs: Any, **named: Any) -> Any:
        x_XD, logits_XP = x if isinstance(x, tuple) else (x, None)
        if not self.moe_enabled:
            return super().forward(x_XD, *inputs, **named), logits_XP
        gate = self.moe.router.gate
        gate.previous_XP = logits_XP
        x_XD = super().forward(x_XD, *inputs, **named)
        # Taken from the gate at once: it would keep the graph of this microbatch alive.
        logits_XE, gate.previous_XP, gate.sum_XE = gate.sum_XE, None, None
        return (x_XD, logits_XE) if self.gives else x_XD


@cache
def _block_like(host_class: Any) -> Any:
    class Passing(_Block, host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):
            gives: bool

        def __init__(self, config: Config):
            super().__init__(config)
            self.gives = config.gives

    return named_after(Passing, host_class)


@cache
def _gate_like(host_class: Any) -> Any:
    class Residual(_Gate, host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):
            residual: Linear.Config | None

        def __init__(self, config: Config):
            super().__init__(config)
            self.residual = config.residual and config.residual.build()

    return named_after(Residual, host_class)


def set_gating_residual(model: Any, flavor: Flavor) -> None:
    """Have the routers of a model's config see the logits of the layer before, in place.

    They are the flavor's routers by now. Layers that predict further tokens keep theirs.

    Raises:
        EzpzError: no layer has one with experts before it.
    """
    numbers = [n for n, layer in enumerate(model.layers) if layer.moe is not None]
    if len(numbers) < 2:
        raise EzpzError(
            f"{flavor.source}: [router] gating_residual = true has no effect: only "
            f"{len(numbers)} layer has experts, and none before it. Remove it."
        )
    choices = [model.layers[n].moe.router.num_experts for n in numbers]
    for number, before in zip(numbers, (None, *choices), strict=False):
        router = model.layers[number].moe.router
        router.gate = _with_residual(router.gate, before)
    for number in range(numbers[0], numbers[-1] + 1):
        layer = model.layers[number]
        block = _block_like(type(layer)._owner).Config
        model.layers[number] = derive(layer, block, gives=number < numbers[-1])


def _with_residual(gate: Linear.Config, before: int | None) -> Any:
    """Return the config of the same gate; ``before`` is how many logits its map takes."""
    residual = before and Linear.Config(
        in_features=before, out_features=gate.out_features, param_init={"weight": nn.init.zeros_}
    )
    return derive(gate, _gate_like(type(gate)._owner).Config, residual=residual)
