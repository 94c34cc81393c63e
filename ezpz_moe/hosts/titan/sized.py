"""Build a model of a flavor's own sizes from torchtitan's deepseek_v3."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction
from functools import cache
from typing import Any

from torch import nn
from torchtitan.config.override import derive
from torchtitan.models import deepseek_v3
from torchtitan.models.common import ComplexRoPE

# The host's initial values. `_build_dsv3_layers` is its public `build_mla_moe_layers` with these
# values, and `_output_linear_init` the one that is missing there. The alternative is to copy them.
from torchtitan.models.deepseek_v3 import _build_dsv3_layers, _output_linear_init
from torchtitan.protocols.model_spec import ModelSpec

from ezpz_moe.config.flavors import Dimensions
from ezpz_moe.config.layer_sizes import LayerSizes
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.mixed import named_after

_OF_SHARED = ("num_shared_experts", "shared_hidden_dim", "shared_gate")


def sized_spec(size: Dimensions, attention: str, moe_comm_backend: str) -> ModelSpec:
    """Return the host's deepseek_v3 in another size; what has no size stays as it is there."""
    # Any of its sizes would do: everything with a size is replaced below, and the hooks are the
    # same.
    spec = deepseek_v3.model_registry("debugmodel")
    model = spec.model
    if size.is_uneven:
        model = counted_as_used(model)
    model = dataclasses.replace(
        model,
        vocab_size=size.vocab_size,
        dim=size.dim,
        tok_embeddings=dataclasses.replace(
            model.tok_embeddings, num_embeddings=size.vocab_size, embedding_dim=size.dim
        ),
        norm=dataclasses.replace(model.norm, normalized_shape=size.dim),
        lm_head=dataclasses.replace(
            model.lm_head,
            in_features=size.dim,
            out_features=size.vocab_size,
            param_init=_output_linear_init(size.dim),
        ),
        layers=_layers(size, attention, moe_comm_backend),
    )
    # The host's messages and logs then do not speak of its deepseek_v3.
    return dataclasses.replace(spec, name="ezpz_moe", model=model)


def _layers(size: Dimensions, attention: str, moe_comm_backend: str) -> list[Any]:
    """Return the config of every layer."""
    rope = size.rope.model_dump()
    rope[titan().LONGEST] = rope.pop("max_seq_len")
    of_layer = {"n_dense_layers", "moe_layers", "num_experts", "router_top_k", "moe_hidden_dim"}
    common = size.model_dump(exclude=of_layer | {"vocab_size", "rope", "router_bias", *_OF_SHARED})

    # The host builds a model whose layers are alike, each with the initial values of its depth. So
    # every kind of layer is built at every depth, and each depth takes its own kind.
    @cache
    def alike(of: LayerSizes | None) -> list[Any]:
        experts, top_k, hidden = of or LayerSizes(1, 1, 1)
        return _build_dsv3_layers(
            **common,
            n_dense_layers=0 if of else size.n_layers,
            num_experts=experts,
            router_top_k=top_k,
            moe_hidden_dim=hidden,
            num_shared_experts=size.num_shared_experts or 0,
            rope=ComplexRoPE.Config(dim=size.qk_rope_head_dim, **rope),
            attn_backend=attention,
            moe_comm_backend=moe_comm_backend,
            non_blocking_capacity_factor=None,
        )

    sizes = size.layer_sizes
    layers = [alike(sizes.get(number))[number] for number in range(size.n_layers)]
    if size.shared_hidden_dim is not None or not size.num_shared_experts:
        _set_shared(layers, size.shared_hidden_dim)
    return layers


def counted_as_used(model: Any) -> Any:
    """Return the config of the same model, which counts the FLOPs of what a token uses of a layer.

    The host multiplies all that its routed layers hold with one k / E.
    """
    host_class = type(model)._owner
    return (
        model if hasattr(host_class, "counts_use") else derive(model, _counting(host_class).Config)
    )


@cache
def _counting(host_class: Any) -> Any:
    class Counting(host_class):
        counts_use = True

        @dataclasses.dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):
            def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
                counted = _with_mean_use(self, model)
                return host_class.Config.get_nparams_and_flops(counted, model, seq_len)

    return named_after(Counting, host_class)


def _with_mean_use(config: Any, model: nn.Module) -> Any:
    """Return the config of a model whose first layer with experts says what all of them use.

    The host takes k / E of that layer for all parameters of routed layers. Here they stand for the
    active ones of all layers, and for all. Every token uses what projects it. Like the host's own,
    the sum is rounded down once: with zero-computation experts, parts of it are no whole numbers.
    """
    held, active = 0, Fraction(0)
    for name, parameter in model.named_parameters():
        if found := re.search(r"\blayers\.(\d+)\.moe\.routed_experts\.(\w+)", name):
            moe = config.layers[int(found[1])].moe
            of_all = found[2] in ("descend", "ascend")
            used = 1 if of_all else Fraction(moe.router.top_k, moe.num_experts)
            held += parameter.numel()
            active += parameter.numel() * used
    layers = list(config.layers)
    first = next(number for number, layer in enumerate(layers) if layer.moe is not None)
    moe = layers[first].moe
    router = dataclasses.replace(moe.router, top_k=math.floor(active))
    moe = dataclasses.replace(moe, num_experts=held, router=router)
    layers[first] = dataclasses.replace(layers[first], moe=moe)
    return dataclasses.replace(config, layers=layers)


def _set_shared(layers: list[Any], width: int | None) -> None:
    """Set the width of the shared FFN of every layer with experts, in place; None: it has none."""
    for moe in (layer.moe for layer in layers if layer.moe is not None):
        shared = moe.shared_experts
        moe.shared_experts = width and dataclasses.replace(
            shared,
            w1=dataclasses.replace(shared.w1, out_features=width),
            w2=dataclasses.replace(shared.w2, in_features=width),
            w3=dataclasses.replace(shared.w3, out_features=width),
        )
