"""Turn a flavor into torchtitan 0.2's model arguments, and build the model from them.

A size is the host's deepseek_v3 with other arguments; ``base`` is one of the host's own models.
The arguments carry the flavor's backend. The model is a subclass of the host's: the host builds it,
then its experts are replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.models import _supported_models
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools import utils

from ezpz_moe.config.flavor_schema import ExpertPrecision, Routed
from ezpz_moe.config.flavors import Dimensions, Flavor, flavor_names, load_flavor
from ezpz_moe.errors import EzpzError, did_you_mean, exit_on_user_error
from ezpz_moe.hosts.backends import HOST_PATH, backend_of
from ezpz_moe.hosts.initial_values import initialize_as_one_rank, whole_model
from ezpz_moe.hosts.precision import HOSTS_CAST, experts_dtype
from ezpz_moe.hosts.titan_0_2.experts import refuse_what_came_later, select_backend
from ezpz_moe.hosts.titan_0_2.router import count_on_cpu
from ezpz_moe.hosts.titan_0_2.since_0_3 import refuse_later_keys

SIZED_LIKE = "deepseek_v3"
"""The host's model that flavors with dimensions are sizes of."""


class FlavorArgs(Mapping[str, BaseModelArgs]):
    """Maps flavor names to model arguments, made on request: the command line may have any name.

    Args:
        near: the job's folder, where flavors are looked up first.
        source: who asks for the flavor, for the log.
    """

    def __init__(self, near: Path | None, source: str):
        self._near = near
        self._source = source

    def __getitem__(self, name: str) -> BaseModelArgs:
        flavor = load_flavor(name, near=self._near)
        source = self._source or str(flavor.source)
        return model_args(flavor, why=f"asked for by flavor {name} in {source}")

    def __iter__(self) -> Iterator[str]:
        return iter(flavor_names(near=self._near))

    def __len__(self) -> int:
        return len(flavor_names(near=self._near))


def host_model(flavor: Flavor) -> str:
    """Return the name of the host's model that the flavor is built from."""
    return SIZED_LIKE if flavor.base is None else flavor.base.partition("/")[0]


def model_args(flavor: Flavor, *, why: str = "") -> BaseModelArgs:
    """Return the host's arguments for the flavor's model, with its backend.

    Args:
        flavor: what to build.
        why: who chose the backend, for the log; by default the flavor.

    Raises:
        EzpzError: the host has no such model or attention, or cannot express the flavor.
    """
    refuse_later_keys(flavor)
    args: Any = (
        _upstream_args(flavor)
        if flavor.dimensions is None
        else _sized_args(flavor.dimensions, str(flavor.source))
    )
    _choose_attention(args, flavor)
    backend_of(flavor)  # reports a mistake in its options now, and not when the model is built
    if flavor.compute_backend != HOST_PATH:
        args.moe_args.use_grouped_mm = False  # otherwise the host warns that it cannot use it
    args_class: Any = type(args)
    return _with_choice(args_class)(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(args)},
        host_model=host_model(flavor),
        compute_backend=flavor.compute_backend,
        chosen_by=why or f"flavor {flavor.name}",
        expert_precision=flavor.expert_precision,
        routed=flavor.routed,
        max_positions=flavor.dimensions.rope.max_seq_len if flavor.dimensions else None,
    )


def build_model(args: Any) -> nn.Module:
    """Build the model from arguments of :func:`model_args`, as the host's ``model_cls``.

    Raises:
        EzpzError: its experts cannot be computed by the backend.
    """
    return _with_backends(get_train_spec(args.host_model).model_cls)(args)


@cache
def _with_choice(args_class: Any) -> Any:
    """Return ``args_class`` with the fields that :func:`build_model` needs."""

    @dataclasses.dataclass
    class ChosenArgs(args_class):
        host_model: str = ""
        compute_backend: str = HOST_PATH
        chosen_by: str = ""
        expert_precision: ExpertPrecision | None = None
        routed: Routed = "one_node"
        computed_in: str = HOSTS_CAST
        """What that means in this run: name of a dtype."""
        max_positions: int | None = None
        """Positions of a size's RoPE; None leaves them to the host."""

        def update_from_config(self, job_config: JobConfig, **kwargs: Any) -> None:
            super().update_from_config(job_config, **kwargs)
            # Here, because the host calls this with the flags applied.
            param = job_config.training.mixed_precision_param
            self.computed_in = experts_dtype(self.expert_precision, param, utils.device_type)
            if utils.device_type == "cpu":
                # The grouped path pads tokens with a Triton kernel. Not every model of the host
                # checks for it.
                self.moe_args.use_grouped_mm = False
            if self.max_positions is not None:
                # The host sets it to the sequence length, and turns YaRN off if that is short. A
                # flavor is the same model at every length, as in torchtitan 0.3.
                self.max_seq_len = self.max_positions

    ChosenArgs.__name__ = ChosenArgs.__qualname__ = f"Ezpz{args_class.__name__}"
    return ChosenArgs


@cache
def _with_backends(model_class: Any) -> Any:
    """Return ``model_class`` with its experts computed by the arguments' backend."""

    class SelectedModel(model_class):
        def __init__(self, args: Any):
            super().__init__(args)
            # The functions of our TrainSpec get only the model, and look up the host's spec by
            # this.
            self.host_model = args.host_model
            self.computed_in = args.computed_in
            self._attention = args.attn_type
            self._selected = args.compute_backend, args.chosen_by
            select_backend(self, *self._selected, args.computed_in, args.routed)
            if utils.device_type == "cpu":
                count_on_cpu(self)
            # Last: the copy has to have the replaced experts.
            self._whole = whole_model(self)

        def init_weights(self, buffer_device: torch.device | None = None) -> None:
            with exit_on_user_error():
                refuse_what_came_later(self, *self._selected)
                initialize_as_one_rank(self, self._whole, _as_the_host_does, buffer_device)

        def get_attention_masks(self, *args: Any, **kwargs: Any) -> Any:
            if self._attention == "sdpa":
                # The validator of 0.2.2 asks every model, and takes this error as "none".
                raise TypeError("SDPA takes no attention masks")
            return super().get_attention_masks(*args, **kwargs)

    def _as_the_host_does(model: Any, buffer_device: torch.device | None) -> None:
        model_class.init_weights(model, buffer_device=buffer_device)

    SelectedModel.__name__ = SelectedModel.__qualname__ = f"Ezpz{model_class.__name__}"
    return SelectedModel


def _sized_args(size: Dimensions, where: str) -> DeepSeekV3ModelArgs:
    """Return the host's deepseek_v3 in another size; what has no size stays as it is there."""
    rope, (of, *_) = size.rope, size.layer_sizes.values()  # of all its layers
    scaled = rope.scaling == "yarn" and rope.rope_factor > 1
    if scaled and rope.max_seq_len <= rope.original_seq_len:
        raise EzpzError(
            f"{where}: rope: torchtitan 0.2 applies YaRN only if max_seq_len "
            f"({rope.max_seq_len}) exceeds original_seq_len ({rope.original_seq_len}). Raise "
            'max_seq_len, or set scaling = "none".'
        )
    return DeepSeekV3ModelArgs(
        vocab_size=size.vocab_size,
        dim=size.dim,
        inter_dim=size.dense_hidden_dim,
        moe_inter_dim=of.hidden_dim,
        n_layers=size.n_layers,
        n_dense_layers=size.moe_layer_numbers[0],
        n_heads=size.n_heads,
        q_lora_rank=size.q_lora_rank,
        kv_lora_rank=size.kv_lora_rank,
        qk_nope_head_dim=size.qk_nope_head_dim,
        qk_rope_head_dim=size.qk_rope_head_dim,
        v_head_dim=size.v_head_dim,
        mscale=size.mscale,
        max_seq_len=rope.max_seq_len,
        # The host scales, and applies mscale, if max_seq_len exceeds this.
        original_seq_len=rope.original_seq_len if scaled else rope.max_seq_len,
        rope_theta=rope.theta,
        rope_factor=rope.rope_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        moe_args=MoEArgs(
            num_experts=of.num_experts,
            num_shared_experts=_shared_experts(size, where),
            top_k=of.top_k,
            score_func=size.router_score_func,
            route_norm=size.router_route_norm,
            route_scale=size.router_route_scale,
            num_expert_groups=size.router_num_expert_groups,
            num_limited_groups=size.router_num_limited_groups,
            score_before_experts=False,
        ),
        attn_type="flex",
        attn_mask_type="block_causal",
    )


def _shared_experts(size: Dimensions, where: str) -> int:
    """Return how many experts are as wide as the shared FFN."""
    hidden = next(iter(size.layer_sizes.values())).hidden_dim  # of all its layers
    number, rest = divmod(size.shared_width(hidden), hidden)
    if rest:
        raise EzpzError(
            f"{where}: shared_hidden_dim = {size.shared_hidden_dim}: torchtitan 0.2's shared "
            "experts are as wide as a number of routed ones. Set num_shared_experts, or install "
            "torchtitan 0.3."
        )
    return number


def _upstream_args(flavor: Flavor) -> BaseModelArgs:
    """Return a copy of the arguments of one of the host's own models, ``flavor.base``."""
    assert flavor.base is not None  # a Flavor has dimensions or a base
    name, _, upstream = flavor.base.partition("/")
    where = f"{flavor.source}: base = {flavor.base!r}"
    known = _upstream_spec(name, where).model_args
    if upstream not in known:
        raise EzpzError(
            f"{where}: torchtitan's {name} has no flavor {upstream!r}."
            f"{did_you_mean(upstream, known)} It has {', '.join(known)}."
        )
    args = known[upstream]
    if not hasattr(args, "moe_args") or not getattr(args, "moe_enabled", True):
        raise EzpzError(
            f"{where}: this model is dense: it has no routed experts to compute. "
            'Name a mixture-of-experts model, for example "qwen3/30B-A3B".'
        )
    return deepcopy(args)  # the host changes arguments in place


def _upstream_spec(name: str, where: str) -> TrainSpec:
    if name not in _supported_models:
        raise EzpzError(
            f"{where}: torchtitan has no model module {name!r}."
            f"{did_you_mean(name, _supported_models)} "
            f"It has {', '.join(sorted(_supported_models))}."
        )
    try:
        return get_train_spec(name)
    except ImportError as error:
        raise EzpzError(
            f"{where}: torchtitan's {name} cannot be imported here: {error}. Install what it needs."
        ) from error


# In the terms of the host's models ("Varlen attention is not supported with Deepseek V3").
_ATTENTIONS: Mapping[str, tuple[str, ...]] = {
    "gpt_oss": ("flex",),
    "qwen3": ("flex", "sdpa", "varlen"),
}
_USUAL_ATTENTIONS = ("flex", "sdpa")


def _choose_attention(args: Any, flavor: Flavor) -> None:
    """Set the flavor's attention in the host's arguments, in place; None changes nothing."""
    if flavor.attention is None or flavor.attention == args.attn_type:
        return
    allowed = _ATTENTIONS.get(host_model(flavor), _USUAL_ATTENTIONS)
    if flavor.attention not in allowed:
        raise EzpzError(
            f"{flavor.source}: attention = {flavor.attention!r}: torchtitan 0.2's "
            f"{host_model(flavor)} supports only {' and '.join(allowed)} attention."
        )
    args.attn_type = flavor.attention
    # SDPA takes no mask, so it is causal over the whole packed sequence.
    args.attn_mask_type = "causal" if flavor.attention == "sdpa" else "block_causal"
