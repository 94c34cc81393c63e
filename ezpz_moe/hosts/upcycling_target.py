"""Describe the mixture of experts that ``ezpz-moe upcycle`` builds, as the host sees it.

Legend: E = experts, F = hidden dimension of an expert, D = model dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ezpz_moe.config.flavors import Flavor

# Gate, down and up of a SwiGLU FFN: w2(silu(w1 x) * w3 x).
PARTS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Layer:
    """A layer with experts, and the names of its parameters.

    Attributes:
        name: for example "layers.3".
        dense: w1, w2, w3 of the FFN in the dense model.
        experts: w1 [E, F, D], w2 [E, D, F], w3 [E, F, D] of the routed experts.
        shared: w1, w2, w3 of the shared experts, with their summed width; empty if there are none.
        gate: the router's weight [E, D].
        zeros: what starts at zero: the selection bias, the router's bias, the shared experts' gate.
        num_experts, top_k, score_func, route_norm, route_scale: the router's.
        num_groups: groups of experts that limit a token's choice; None without a limit.
    """

    name: str
    dense: Mapping[str, str]
    experts: Mapping[str, str]
    shared: Mapping[str, str]
    gate: str
    zeros: tuple[str, ...]
    num_experts: int
    top_k: int
    score_func: str
    route_norm: bool
    route_scale: float
    num_groups: int | None


@dataclass(frozen=True)
class Target:
    """The model to build.

    Attributes:
        flavor: its flavor.
        tensors: its parameters and buffers on the meta device, by name.
        layers: those with experts.
        generation: the one that uses these names.
    """

    flavor: Flavor
    tensors: Mapping[str, torch.Tensor]
    layers: tuple[Layer, ...]
    generation: str
