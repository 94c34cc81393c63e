"""Make a model of the host's dense: an FFN where each layer has experts, at the same cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchtitan.models.common.config_utils import make_ffn_config
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.model_spec import ModelSpec

from ezpz_moe.config.flavor_schema import Equal, Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import dense_hidden_dim, ffn_matrices
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.components import weigh


def make_dense(spec: ModelSpec, hidden: int, flavor: Flavor) -> None:
    """Replace the experts of every layer with an FFN, in place.

    The FFN starts with the values that the host gives its experts there.

    Args:
        spec: a model with the host's own experts.
        hidden: the FFN's hidden size.
        flavor: the baseline, for messages.

    Raises:
        EzpzError: the layers of this model cannot do without experts.
    """
    for layer in spec.model.layers:
        if layer.moe is not None:
            layer.feed_forward, layer.moe = _ffn(layer.moe, spec.model.dim, hidden, flavor), None
    _refuse_without_ffn(spec.model.layers[-1], flavor)


def hidden_dim(config: Any, activation: str, equal: Equal) -> int:
    """Return the hidden size of the FFN that costs as much as a layer's experts, to the unit.

    Args:
        config: the model with experts, as it would be trained: a gate has a column for each
            zero-computation expert, too.
        activation: of the FFN.
        equal: which cost.
    """
    with torch.device("meta"):
        model = config.build()
    costs, _ = weigh(model)
    layers = sum(isinstance(module, MoE) for module in model.modules())
    return dense_hidden_dim(costs, config.dim, layers, ffn_matrices(activation), equal=equal)


def _ffn(moe: Any, dim: int, hidden: int, flavor: Flavor) -> Any:
    _, node, _, _ = next(moe.traverse(titan().experts().HostExperts.Config))
    drawn = titan().experts().initial_values(node)
    if drawn is None:
        raise _no_dense_form(flavor)
    gate, down, up = drawn
    ffn = make_ffn_config(
        dim=dim,
        hidden_dim=hidden,
        w1_param_init={"weight": gate},
        w2w3_param_init={"weight": down},
    )
    # The host's helper draws both alike, which its experts do not in every model. Where gate and up
    # are one linear, there is no other.
    if hasattr(ffn, "w3"):
        ffn.w3.param_init = {"weight": up}
    return ffn


def _refuse_without_ffn(layer: Any, flavor: Flavor) -> None:
    """Refuse a family whose layers take experts alone: it asserts that, or ignores the FFN."""
    try:
        with torch.device("meta"):
            has_ffn = isinstance(getattr(layer.build(), "feed_forward", None), nn.Module)
    except AssertionError:
        has_ffn = False
    if not has_ffn:
        raise _no_dense_form(flavor)


def _no_dense_form(flavor: Flavor) -> EzpzError:
    return EzpzError(
        f"{flavor.source}: dense_baseline_of: the layers of torchtitan's {flavor.base} have no "
        "dense form. Name a flavor of another family."
    )
