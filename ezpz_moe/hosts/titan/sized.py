"""Build a model of a flavor's own sizes from torchtitan's deepseek_v3."""

from __future__ import annotations

import dataclasses

from torchtitan.models import deepseek_v3
from torchtitan.models.common import ComplexRoPE

# The host's initial values. `_build_dsv3_layers` is its public `build_mla_moe_layers` with these
# values, and `_output_linear_init` the one that is missing there. The alternative is to copy them.
from torchtitan.models.deepseek_v3 import _build_dsv3_layers, _output_linear_init
from torchtitan.protocols.model_spec import ModelSpec

from ezpz_moe.config.flavors import Dimensions
from ezpz_moe.hosts.titan.base import titan


def sized_spec(size: Dimensions, attention: str, moe_comm_backend: str) -> ModelSpec:
    """Return the host's deepseek_v3 in another size; what has no size stays as it is there."""
    # Any of its sizes would do: everything with a size is replaced below, and the hooks are the
    # same.
    spec = deepseek_v3.model_registry("debugmodel")
    rope = size.rope.model_dump()
    rope[titan().LONGEST] = rope.pop("max_seq_len")
    layers = _build_dsv3_layers(
        **size.model_dump(exclude={"vocab_size", "rope", "router_bias"}),
        rope=ComplexRoPE.Config(dim=size.qk_rope_head_dim, **rope),
        attn_backend=attention,
        moe_comm_backend=moe_comm_backend,
        non_blocking_capacity_factor=None,
    )
    model = spec.model
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
        layers=layers,
    )
    # The host's messages and logs then do not speak of its deepseek_v3.
    return dataclasses.replace(spec, name="ezpz_moe", model=model)
