"""The learned scale of a gate's activation: one more parameter of its node, ``gate.scale_E``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn


def add_scale(gate: Any, experts: int) -> None:
    """Give a gate that is being built a scale of ones, which its host initializes with the rest.

    Args:
        gate: of the host's class.
        experts: what it chooses from, E.
    """
    gate.scale_E = nn.Parameter(torch.ones(experts))
    # A gate without initializers is an error of the host's own, which names the weight.
    gate._param_init = {**(gate._param_init or {}), "scale_E": nn.init.ones_}


def lay_out_scale(gate: Any) -> None:
    """Lay the scale out as the gate's weight, in place: every rank has all of it.

    Both have their gradients from the tokens of a rank.
    """
    config = gate._sharding_config
    if config is not None and gate.scale_E is not None:
        states = {**config.state_shardings, "scale_E": config.state_shardings["weight"]}
        gate._sharding_config = replace(config, state_shardings=states)
