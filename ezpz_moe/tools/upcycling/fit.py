"""How a dense FFN becomes the experts of a :class:`Target`.

Legend: E = experts, k = experts that a token uses, F = hidden dimension of an expert, H = hidden
dimension of the dense FFN, D = model dimension, G = H / F.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.upcycling_target import PARTS, Layer, Target


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
    """Refuse a router that gives a token other initial weights than the model's own top-k.

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
    """Return the sum of a token's k weights if all scores are equal, without the scale.

    1 if they are normalized; k/E for a softmax over all experts; k/2 for sigmoids of zeros.
    """
    if layer.route_norm:
        return 1.0
    return layer.top_k / layer.num_experts if layer.score_func == "softmax" else layer.top_k / 2


def fit(target: Target, layer: Layer, shapes: Mapping[str, torch.Size], source: object) -> Fit:
    """Decide how the dense FFN with ``shapes`` becomes the experts of ``layer``.

    A token that chooses whole copies gets ``scale * route_scale * weight_sum / G`` times the dense
    FFN's output, and ``scale`` makes that 1.

    Raises:
        EzpzError: the shapes do not fit, or a token cannot choose whole copies.
    """
    flavor = target.flavor.name
    hidden, dim = target.tensors[layer.experts["w1"]].shape[1:]
    dense_hidden = sum(shapes["w1"][:1])  # 0 if it is a single number, which then does not fit
    # At least 1: a dense FFN smaller than an expert then fails the check of its shape below.
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
    # A router limited to groups must find all parts of a copy in one group.
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
    # A token has k / G copies, and each part of them the weight total / k (times route_scale):
    # together total / G of the dense output.
    return Fit(granularity, granularity / (layer.route_scale * total), total)
