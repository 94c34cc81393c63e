"""Change sizes and scores of a model of the host's, in the tree of its config nodes.

Every node has its sizes from the host's registry, so each of the nodes that share a size is set.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import MoE

from ezpz_moe.config.change_schema import Change
from ezpz_moe.config.flavor_schema import group_conflicts, limit_conflicts
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.initial_scale import Place, moved, replace_each, widened

_READS = frozenset({"wq", "wk", "wv", "wkv", "wqkv", "wq_a", "wkv_a"})
"""An attention's projections of the layer's input, in all models of the host."""

_INNER = frozenset({"wq_b", "wkv_b"})
"""Its projections of latents, which do not see the model's dimension."""

_ROUTER = {
    "router_top_k": "top_k",
    "router_score_func": "score_func",
    "router_route_scale": "route_scale",
    "router_route_norm": "route_norm",
    "router_num_expert_groups": "num_expert_groups",
    "router_num_limited_groups": "num_limited_groups",
}
"""Key of a flavor -> field of the host's router."""


@dataclass(frozen=True)
class Sizes:
    """What ``[change]`` can change, as a model has it; None for what the model has not."""

    vocab_size: int
    dim: int
    n_layers: int
    n_dense_layers: int
    dense_hidden_dim: int | None
    moe_hidden_dim: int
    num_experts: int
    num_shared_experts: int | None
    router_top_k: int
    router_score_func: str
    router_route_scale: float
    router_route_norm: bool
    router_num_expert_groups: int | None
    router_num_limited_groups: int | None
    router_bias: bool


def sizes_of(model: Any) -> Sizes:
    """Return the sizes of a model's config, with those of its first layer that has experts."""
    layers = model.layers
    first = next(each.moe for each in layers if each.moe is not None)
    dense = next((each.feed_forward for each in layers if each.feed_forward is not None), None)
    experts, shared = _experts(first), first.shared_experts
    return Sizes(
        vocab_size=model.vocab_size,
        dim=model.dim,
        n_layers=len(layers),
        n_dense_layers=_dense_layers(layers),
        dense_hidden_dim=dense and dense.w2.in_features,
        moe_hidden_dim=experts.hidden_dim,
        num_experts=experts.num_experts,
        num_shared_experts=shared and shared.w2.in_features // experts.hidden_dim,
        router_bias=first.router.gate.bias,
        **{key: getattr(first.router, field) for key, field in _ROUTER.items()},
    )


def without_effect(model: Any, change: Change) -> dict[str, Any]:
    """Return what ``[change]`` says that the base's ``model`` has already."""
    own = dataclasses.asdict(sizes_of(model))
    return {key: value for key, value in change.values.items() if own[key] == value}


def change_model(model: Any, change: Change, where: str) -> None:
    """Change the config of a whole model, in place.

    Args:
        model: fresh from the host's registry.
        change: what differs.
        where: file and base, for messages.

    Raises:
        EzpzError: the model has no such part, the sizes do not fit together, or its nodes do not
            show where a size belongs.
    """
    old, values = sizes_of(model), change.values
    new = dataclasses.replace(old, **values)
    if problems := list(_problems(old, new, change)):
        raise EzpzError(f"{where}: [change] {'; '.join(problems)}.")
    try:
        # Only what differs: the rest stays the host's, node by node.
        if (old.n_layers, old.n_dense_layers) != (new.n_layers, new.n_dense_layers):
            model.layers = _layers(model.layers, new.n_layers, new.n_dense_layers)
        if old.dim != new.dim:
            _set_dim(model, new.dim)
        if old.vocab_size != new.vocab_size:
            _set_vocabulary(model, new.vocab_size)
        for layer in model.layers:
            if layer.moe is not None:
                _set_moe(layer.moe, old, new)
            elif new.dense_hidden_dim != old.dense_hidden_dim:
                _set_ffn(layer.feed_forward, new.dense_hidden_dim)
    except _Unknown as unknown:
        raise EzpzError(f"{where}: [change] {unknown}.") from None


class _Unknown(Exception):
    """The model does not show how a size reaches its nodes."""


def _problems(old: Sizes, new: Sizes, change: Change) -> Iterator[str]:
    """Yield why the model cannot have these sizes."""
    for key, part in (
        ("dense_hidden_dim", "dense FFN"),
        ("num_shared_experts", "shared expert"),
    ):
        if getattr(old, key) is None and getattr(new, key) is not None:
            yield f"{key} = {getattr(new, key)}: no layer of this model has a {part}. Remove it"
    if new.n_dense_layers > old.n_dense_layers == 0:
        yield (
            f"n_dense_layers = {new.n_dense_layers}: every layer of this model has experts, so "
            "there is no dense one to copy. Remove it"
        )
    if new.n_dense_layers >= new.n_layers:
        yield (
            f"n_dense_layers ({new.n_dense_layers}) must be less than n_layers "
            f"({new.n_layers}), or no layer has experts"
        )
    if new.router_top_k > new.num_experts:
        yield f"router_top_k ({new.router_top_k}) must not exceed num_experts ({new.num_experts})"
    yield from limit_conflicts(new)
    yield from group_conflicts(new, new.num_experts, new.router_top_k)
    if new.num_experts == new.router_num_expert_groups and not change.scores_otherwise:
        yield (
            f"router_num_expert_groups ({new.router_num_expert_groups}) makes each expert a group: "
            "write num_experts and router_num_expert_groups both, which says that you mean it"
        )


# --- layers ---------------------------------------------------------------------------------------


def _dense_layers(layers: list[Any]) -> int:
    return next(i for i, each in enumerate(layers) if each.moe is not None)


def _layers(old: list[Any], n_layers: int, n_dense: int) -> list[Any]:
    """Return so many layers, each a copy of one of its kind, with its own depth's values."""
    made = []
    for i in range(n_layers):
        source = _source(old, i, n_dense)
        layer = copy.deepcopy(old[source])
        there, here = Place(source, len(old)), Place(i, n_layers)
        replace_each(layer, _moving(there, here))
        made.append(layer)
    return made


def _moving(old: Place, new: Place) -> Callable[[str, str, Any], Any]:
    return lambda path, name, draw: moved(draw, old, new)


def _source(old: list[Any], i: int, n_dense: int) -> int:
    """Return which of the old layers the new layer ``i`` is like.

    Raises:
        _Unknown: the layers follow no pattern that could go on.
    """
    is_dense = i < n_dense
    # Of the last layer, a scale by the layer's number and one by the depth look alike.
    if i < len(old) - 1 and is_dense == (old[i].moe is None):
        return i
    if is_dense:
        return 0
    first = _dense_layers(old)
    period = _period([_kind(each) for each in old[first:]])
    return first + (i - first) % period


def _period(kinds: list[Any]) -> int:
    """Return after how many layers the kinds repeat."""
    for period in range(1, max(len(kinds) // 2, 1) + 1):
        if all(kinds[i] == kinds[i - period] for i in range(period, len(kinds))):
            return period
    raise _Unknown("n_layers: the layers of this model follow no pattern that could go on")


def _kind(node: Any) -> Any:
    """Return what a layer is, without its initial values."""
    if not dataclasses.is_dataclass(node):
        return node
    fields = [each.name for each in dataclasses.fields(node) if each.name != "param_init"]
    return type(node), [_kind(getattr(node, name)) for name in fields]


# --- widths ---------------------------------------------------------------------------------------


def _set_dim(model: Any, dim: int) -> None:
    """Give everything that reads or writes the residual stream another dimension.

    Raises:
        _Unknown: something else depends on it.
    """
    if getattr(model, "vision_encoder", None) is not None:
        raise _Unknown(f"dim = {dim}: this model's vision encoder ends in the base's. Remove it")
    old, model.dim = model.dim, dim
    model.tok_embeddings.embedding_dim = dim
    model.norm.normalized_shape = dim
    model.lm_head.in_features = dim
    replace_each(model.lm_head, lambda path, name, draw: widened(draw, old, dim))
    for layer in model.layers:
        layer.attention_norm.normalized_shape = layer.ffn_norm.normalized_shape = dim
        _set_attention_dim(layer.attention, dim)
        if layer.moe is None:
            _set_ffn_dim(layer.feed_forward, dim)
            continue
        layer.moe.router.gate.in_features = dim
        if layer.moe.shared_experts is not None:
            _set_ffn_dim(layer.moe.shared_experts, dim)
        titan().experts().resize(_experts_node(layer.moe), dim=dim)
        dispatcher = layer.moe.routed_experts.token_dispatcher
        if getattr(dispatcher, "hidden_dim", None) is not None:
            dispatcher.hidden_dim = dim


def _set_attention_dim(attention: Any, dim: int) -> None:
    if getattr(attention, "head_dim", 0) is None:  # the host would divide the new one by the heads
        attention.head_dim = attention.dim // attention.n_heads
    if hasattr(attention, "dim"):
        attention.dim = dim
    for path, linear, _, _ in attention.traverse(Linear.Config):
        match path.rpartition(".")[2]:
            case name if name in _READS:
                linear.in_features = dim
            case "wo":
                linear.out_features = dim
            case name if name not in _INNER:
                raise _Unknown(f"dim = {dim}: this model's attention has an unknown part {path}")


def _set_ffn_dim(ffn: Any, dim: int) -> None:
    for name, linear, _, _ in ffn.traverse(Linear.Config):
        if name == "w2":
            linear.out_features = dim
        else:
            linear.in_features = dim


def _set_ffn(ffn: Any, hidden: int | None) -> None:
    """Give an FFN another hidden size, in place.

    Raises:
        _Unknown: it has a part that another host may have added.
    """
    for name, linear, _, _ in ffn.traverse(Linear.Config):
        if name == "w2":
            linear.in_features = hidden
        elif name in ("w1", "w3"):
            linear.out_features = hidden
        elif name != "gate":  # which some shared experts have, with one output
            raise _Unknown(
                f"the hidden size {hidden}: an FFN of this model has an unknown part {name}"
            )


def _set_vocabulary(model: Any, size: int) -> None:
    model.vocab_size = size
    model.tok_embeddings.num_embeddings = size
    model.lm_head.out_features = size


# --- experts --------------------------------------------------------------------------------------


def _experts_node(moe: Any) -> Any:
    # The node is RoutedExperts itself since September 2026, and below it before.
    _, node, _, _ = next(moe.traverse(titan().experts().HostExperts.Config))
    return node


def _experts(moe: Any) -> Any:
    return titan().experts().sizes(_experts_node(moe))


def _set_moe(moe: Any, old: Sizes, new: Sizes) -> None:
    """Set a layer's gate, router, experts, dispatcher and shared experts, in place."""
    moe.num_experts = moe.router.num_experts = moe.router.gate.out_features = new.num_experts
    _set_router_bias(moe, new.router_bias)
    for key, field in _ROUTER.items():
        setattr(moe.router, field, getattr(new, key))
    dispatcher = moe.routed_experts.token_dispatcher
    dispatcher.num_experts, dispatcher.top_k = new.num_experts, new.router_top_k
    experts = titan().experts()
    experts.resize(_experts_node(moe), num_experts=new.num_experts, hidden_dim=new.moe_hidden_dim)
    shared = (new.num_shared_experts, new.moe_hidden_dim)
    if moe.shared_experts is not None and shared != (old.num_shared_experts, old.moe_hidden_dim):
        _set_ffn(moe.shared_experts, math.prod(filter(None, shared)))


def bias_routers(model: Any) -> None:
    """Give the gates of a model a bias, in place."""
    for _, moe, _, _ in model.traverse(MoE.Config):
        _set_router_bias(moe, True)


def _set_router_bias(moe: Any, bias: bool) -> None:
    gate = moe.router.gate
    gate.bias = bias
    if bias:
        gate.param_init = {"bias": nn.init.zeros_, **gate.param_init}
