"""Give a model's layers the initial values of a flavor's ``[init]``, in their config nodes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ezpz_moe.config.init_schema import Init
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.initial_scale import (
    BASE,
    Draw,
    Place,
    replace_each,
    std_of,
    with_std,
)

_OUTPUTS = frozenset({"wo", "w2", "out_proj"})
"""Linears that write into the residual stream: of attention, and of an FFN."""

_OUTPUTS_OF_EXPERTS = ("w2_", "mlp2_weight")
"""How the same weight begins where a module holds all of an expert's."""


def initialize(model: Any, init: Init, where: str) -> None:
    """Replace the initializers of every layer, in place. Embeddings and head keep theirs.

    Args:
        model: the config of a whole model, of the host's own classes.
        init: what the flavor says; None in it keeps the host's.
        where: the flavor's file, for messages.

    Raises:
        EzpzError: a weight's standard deviation is not one of those that the host's models have.
    """
    for number, layer in enumerate(model.layers):
        place = Place(number, len(model.layers))
        replace_each(layer, partial(_drawn, init, place, where))


def _drawn(init: Init, place: Place, where: str, path: str, name: str, draw: Draw) -> Draw:
    std = std_of(draw)
    if std is None:
        return draw  # norms start at one, most biases at zero
    known = (BASE, place.std_by_layer, place.std_by_depth)
    if not any(math.isclose(std, each) for each in known):
        raise EzpzError(
            f"{where}: [init]: torchtitan draws {path}.{name} of layer {place.layer} with a "
            f"standard deviation of {std:g}, of which it is not known what it depends on. Remove "
            "[init]."
        )
    factor = _factor(init, place, path, name, std)
    if init.experts and "routed_experts" in path.split(".") and "bias" not in name:
        return _of_experts(init.experts, factor, init.std or BASE)
    return with_std(draw, factor * (init.std or BASE))


def _factor(init: Init, place: Place, path: str, name: str, std: float) -> float:
    """Return what scales the standard deviation of this weight."""
    if init.residual is None:
        return std / BASE  # as the host scales it
    is_output = path.rpartition(".")[2] in _OUTPUTS or name.startswith(_OUTPUTS_OF_EXPERTS)
    return place.std_by_layer / BASE if init.residual == "depth" and is_output else 1.0


def _of_experts(kind: str, factor: float, std: float) -> Draw:
    if kind == "kaiming_uniform":
        return partial(_kaiming_uniform, factor)
    draw = nn.init.normal_ if kind == "normal" else nn.init.trunc_normal_
    return partial(draw, std=factor * std)


def _kaiming_uniform(factor: float, weight: Tensor) -> None:
    """Draw weights [E, ..., out, in] within 1/sqrt(in), as torch does for a linear of its own.

    torch's ``kaiming_uniform_`` would take the experts for channels of one large kernel.
    """
    bound = factor * weight.shape[-1] ** -0.5
    with torch.no_grad():
        weight.uniform_(-bound, bound)
