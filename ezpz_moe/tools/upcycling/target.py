"""The mixture of experts to build, as the host describes it, and how a dense FFN fits into it.

Legend: E = experts, k = experts that a token uses, F = hidden dimension of an expert, H = hidden
dimension of the dense FFN, D = model dimension, G = H / F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError

PARTS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Layer:
    """A layer with experts, and its parameters' names.

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
        tied: what a model with tied embeddings may lack -> what replaces it.
        generation: the one that uses these names.
    """

    flavor: Flavor
    tensors: Mapping[str, torch.Tensor]
    layers: tuple[Layer, ...]
    tied: Mapping[str, str]
    generation: str


@dataclass(frozen=True)
class Fit:
    """How the dense FFN becomes the experts of a layer.

    Attributes:
        granularity: G, the parts that it is split into.
        scale: the factor on the experts' w2.
        weight_sum: the sum of the weights of a token's k experts if all scores are equal.
    """

    granularity: int
    scale: float
    weight_sum: float


def check_routing(flavor: Flavor) -> None:
    """Refuse a router whose initial weights differ from those of the model's own top-k.

    Raises:
        EzpzError: the flavor's ``[router]`` makes the output something other than a weighted sum of
            the copies.
    """
    router, where = flavor.router, f"{flavor.source}: [router]"
    then = "Upcycle with a flavor without it; its checkpoint has the same names either way"
    if router.zero_computation_experts:
        raise EzpzError(
            f"{where} null_experts, copy_experts, constant_experts: these take part of a token's "
            "weight, which the copies of the dense FFN need, and the router has rows for them. "
            "Upcycle with a flavor without them."
        )
    if router.routing != "topk":
        raise EzpzError(
            f'{where} routing = "{router.routing}": what its weights sum to depends on the data. '
            f"{then}."
        )
    if router.activation != "identity":
        raise EzpzError(
            f'{where} activation = "{router.activation}": changes what the weights of a token sum '
            f"to. {then}."
        )


def weight_sum(layer: Layer) -> float:
    """The sum of the weights of a token's k experts if all scores are equal, without the scale.

    1 if they are normalized; k/E for a softmax over all experts; k/2 for sigmoids of zeros.
    """
    if layer.route_norm:
        return 1.0
    return layer.top_k / layer.num_experts if layer.score_func == "softmax" else layer.top_k / 2


def fit(target: Target, layer: Layer, shapes: Mapping[str, torch.Size], source: object) -> Fit:
    """How the dense FFN with ``shapes`` becomes the experts of ``layer``.

    A token that chooses whole copies gets ``scale * route_scale * weight_sum / G`` times the dense
    FFN's output, and ``scale`` makes that 1.

    Raises:
        EzpzError: the shapes do not fit, or a token cannot choose whole copies.
    """
    flavor = target.flavor.name
    hidden, dim = target.tensors[layer.experts["w1"]].shape[1:]
    dense_hidden = shapes["w1"][0]
    granularity = max(1, dense_hidden // hidden)
    wanted = {
        "w1": (granularity * hidden, dim),
        "w2": (dim, granularity * hidden),
        "w3": (granularity * hidden, dim),
    }
    for part in PARTS:
        if tuple(shapes[part]) != wanted[part]:
            raise EzpzError(
                f"{source}: {layer.dense[part]} is {list(shapes[part])}, but {layer.experts[part]} "
                f"of flavor {flavor} is {list(target.tensors[layer.experts[part]].shape)}: the "
                f"dense FFN's hidden dimension must be a multiple of an expert's ({hidden}), and "
                f"the model dimension must be the same ({dim})."
            )
    in_group = layer.num_experts // (layer.num_groups or 1)
    for what, number in {
        "num_experts": layer.num_experts,
        "router_top_k": layer.top_k,
        "the experts of a group": in_group,
    }.items():
        if number % granularity:
            raise EzpzError(
                f"{source}: {layer.dense['w1']} {list(shapes['w1'])} becomes {granularity} experts "
                f"of hidden dimension {hidden}, and a token has to choose all of them or none: "
                f"{what} of flavor {flavor}, {number}, must be a multiple of {granularity}."
            )
    total = weight_sum(layer)
    return Fit(granularity, granularity / (layer.route_scale * total), total)
