"""Turn a flavor into torchtitan 0.3's ``ModelSpec``."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

import torchtitan.models
from torchtitan.models.common.attention import BaseAttention
from torchtitan.protocols.model_spec import ModelSpec

from ezpz_moe.config.flavor_schema import Equal, Flavor
from ezpz_moe.config.init_schema import Init
from ezpz_moe.errors import EzpzError, did_you_mean
from ezpz_moe.hosts.reliance import in_words
from ezpz_moe.hosts.titan.attention import use_sdpa
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.selector import select_backend
from ezpz_moe.hosts.titan.sized import counted_as_used, sized_spec
from ezpz_moe.hosts.titan.upstream_configs import (
    VISION,
    config_name,
    door_2,
    letters,
    optimizers,
    requires_images,
)

_DEFAULT_COMM_BACKEND = "standard"


def model_spec(
    flavor: Flavor, *, moe_comm_backend: str = _DEFAULT_COMM_BACKEND, why: str = ""
) -> ModelSpec:
    """Return the flavor's model with its attention and its expert backend in place.

    Args:
        flavor: what to build.
        moe_comm_backend: the host's token dispatcher for expert parallelism.
        why: who chose the backend, for the log; by default the flavor.

    Raises:
        EzpzError: the host has no such model, the model has no experts or does not take text
            alone, or the attention or the backend does not fit it.
    """
    spec = host_spec(flavor, moe_comm_backend=moe_comm_backend)
    _refuse_without_text(spec, flavor)
    if flavor.attention == "sdpa":
        use_sdpa(spec.model)
    if flavor.router_scores == "before":
        with titan().importing():  # only such a flavor needs this from the host
            from ezpz_moe.hosts.titan.scores import score_inputs
        score_inputs(spec.model, str(flavor.source))
    if not flavor.is_dense:
        chosen_by = why or f"flavor {flavor.name}"
        asked = (flavor.compute_backend, chosen_by, flavor.expert_precision, flavor.routed)
        select_backend(spec.model, *asked)
    if flavor.other_ffns:
        with titan().importing():  # only such a flavor needs this from the host
            from ezpz_moe.hosts.titan.ffn_nodes import set_ffns
        set_ffns(spec.model, flavor)
        # The host's adapter knows the names of its own FFNs alone.
        spec = dataclasses.replace(spec, state_dict_adapter=None)
    # After the backend: zero-computation experts wrap the experts' node with the selector in it.
    if flavor.is_routed:
        with titan().importing():  # only such a flavor needs this from the host
            from ezpz_moe.hosts.titan.routing import route
        route(spec, flavor)
    # Last: it takes what the others have made of a layer to another width.
    if flavor.moe_latent_dim is not None:
        with titan().importing():  # only such a flavor needs this from the host
            from ezpz_moe.hosts.titan.latent import set_latent
        spec.model = counted_as_used(spec.model)
        set_latent(spec.model, flavor)
    if flavor.overlap_shared_experts:
        with titan().importing():  # only such a flavor needs this from the host
            from ezpz_moe.hosts.titan.overlap import overlap_shared_experts
        overlap_shared_experts(spec.model, flavor)
    return spec


def host_spec(flavor: Flavor, *, moe_comm_backend: str = _DEFAULT_COMM_BACKEND) -> ModelSpec:
    """Return the flavor's model with the host's own experts and, for "sdpa", its flex attention.

    Raises:
        EzpzError: the host has no such model, refuses it on this machine, or it has no experts.
    """
    # The host refuses the name "sdpa" for language models, but still runs its module.
    attention = "flex" if flavor.attention == "sdpa" else flavor.attention
    try:
        if flavor.dimensions is None:
            spec = _upstream_spec(flavor, attention, moe_comm_backend)
            if flavor.change is not None:
                _changes().change_model(spec.model, flavor.change, _where(flavor))
            if flavor.rope is not None:
                _reach(spec, flavor.rope.max_seq_len, flavor)
        else:
            spec = sized_spec(flavor.dimensions, attention or "flex", moe_comm_backend)
            if flavor.dimensions.router_bias:
                _changes().bias_routers(spec.model)
    except (TypeError, ValueError) as error:
        # This host calls it differently, or for example flex_flash on a GPU before Hopper.
        raise EzpzError(
            f"{flavor.source}: torchtitan refuses flavor {flavor.name!r} "
            f"(attention = {flavor.attention!r}, dispatcher {moe_comm_backend!r}): "
            f"{in_words(error)}"
        ) from error
    if flavor.dense_baseline_of is not None:
        with titan().importing():  # only such a flavor needs this
            from ezpz_moe.hosts.titan.dense import make_dense
        make_dense(spec, _hidden_dim(flavor.dense_baseline_of, flavor.equal), flavor)
    if flavor.init != Init():
        with titan().importing():
            from ezpz_moe.hosts.titan.initialized import initialize
        initialize(spec.model, flavor.init, str(flavor.source))
    return dataclasses.replace(spec, flavor=flavor.name)


def what_differs(flavor: Flavor, spec: ModelSpec) -> str | None:
    """Return what a job trains of a model that sees, which differs from the host; or None."""
    if flavor.base is None or not hasattr(spec.model, VISION):
        return None
    module, _, upstream = flavor.base.partition("/")
    config = config_name(module, upstream)
    theirs = f"torchtitan's {config}" if config else "torchtitan's own config"
    names = ", ".join(optimizers(module, config)) if config else ""
    said = f"base = {flavor.base!r}: the optimizer is the job's, not that of {theirs}"
    said += f" ({names})" if names else ""
    has_vision = getattr(spec.model, VISION) is not None
    return said + "; text trains the language part, not the vision encoder" * has_vision


def _changes() -> Any:
    with titan().importing():  # only flavors that change the host's models need this
        from ezpz_moe.hosts.titan import changed
    return changed


@cache
def _hidden_dim(experts: Flavor, equal: Equal) -> int:
    """Return the hidden size of the FFN of a dense baseline of ``experts``."""
    with titan().importing():
        from ezpz_moe.hosts.titan.dense import hidden_dim
    return hidden_dim(model_spec(experts).model, experts.ffn_activation, equal)


def what_it_equals(flavor: Flavor) -> str | None:
    """Return what a dense baseline has in common with its model of experts; None for another."""
    of = flavor.dense_baseline_of
    if of is None:
        return None
    what = "FLOPs per token" if flavor.equal == "flops" else "parameters"
    return (
        f"flavor {flavor.name} is dense, with the {what} of {of.name}: an FFN of hidden size "
        f"{_hidden_dim(of, flavor.equal)} in place of each layer's experts"
    )


def what_changes_nothing(flavor: Flavor) -> str | None:
    """Return which keys of ``[change]`` the base's model has already; None if there are none."""
    if flavor.change is None:
        return None
    base = _upstream_spec(flavor, None, _DEFAULT_COMM_BACKEND).model
    same = _changes().without_effect(base, flavor.change)
    keys = ", ".join(f"{key} = {json.dumps(value)}" for key, value in same.items())
    return f"{_where(flavor)}: [change] {keys} has no effect: so the base is" if keys else None


def _refuse_without_text(spec: ModelSpec, flavor: Flavor) -> None:
    """Refuse a model that cannot do without a vision encoder: its forward asks for images."""
    fields = {each.name: each for each in dataclasses.fields(spec.model)}
    vision = fields.get(VISION)
    if vision is not None and vision.default is not None:
        raise EzpzError(_needs_images(flavor))


def _needs_images(flavor: Flavor) -> str:
    assert flavor.base is not None  # a size has no vision encoder
    module, _, upstream = flavor.base.partition("/")
    command = door_2(module, upstream, flavor.compute_backend)
    return (
        f"{_where(flavor)}: this model takes images with its text, and a job here has text alone. "
        f"Train torchtitan's own config, which has a loader for both: {command}."
    )


def _where(flavor: Flavor) -> str:
    return f"{flavor.source}: base = {flavor.base!r}"


def _upstream_spec(flavor: Flavor, attention: str | None, moe_comm_backend: str) -> ModelSpec:
    """Return one of the host's own models, ``flavor.base``."""
    assert flavor.base is not None  # a Flavor has dimensions or a base
    module_name, _, upstream = flavor.base.partition("/")
    where = _where(flavor)
    module = _upstream_module(module_name, flavor)
    try:
        spec = module.model_registry(upstream)
    except KeyError as error:
        # A KeyError from inside the registry's builder is the host's bug, not a wrong name.
        if error.args != (upstream,):
            raise
        known = _upstream_flavors(module)
        misspelled = letters(upstream) in map(letters, known)
        if not misspelled and (config := config_name(module_name, upstream)):
            raise EzpzError(
                f"{where}: torchtitan's {module_name} has no such model, but a config {config}: "
                "its loss or other settings differ too. Train that: "
                f"{door_2(module_name, upstream, flavor.compute_backend)}."
            ) from error
        raise EzpzError(
            f"{where}: torchtitan's {module_name} has no flavor {upstream!r}."
            f"{did_you_mean(upstream, known)} It has {', '.join(known)}."
        ) from error
    if not any(True for _ in spec.model.traverse(titan().experts().HostExperts.Config)):
        raise EzpzError(
            f"{where}: this model is dense: it has no routed experts to compute. "
            'Name a mixture-of-experts model, for example "qwen3/30B-A3B".'
        )
    # Pass only what differs from the host's defaults: not every registry takes every option.
    options: dict[str, Any] = {}
    if attention is not None:
        options["attn_backend"] = attention
    if moe_comm_backend != _DEFAULT_COMM_BACKEND:
        options["moe_comm_backend"] = moe_comm_backend
    return module.model_registry(upstream, **options) if options else spec


def _reach(spec: ModelSpec, positions: int, flavor: Flavor) -> None:
    """Let the RoPE of every layer reach so many positions; its frequencies stay as they are.

    Raises:
        EzpzError: no layer of the model has a RoPE.
    """
    attentions = [node for _, node, _, _ in spec.model.traverse(BaseAttention.Config)]
    # Layers of linear attention have none.
    rotating = [node for node in attentions if getattr(node, "rope", None) is not None]
    if not rotating:
        raise EzpzError(f"{_where(flavor)}: this model has no RoPE. Remove [rope].")
    for node in rotating:
        node.rope = dataclasses.replace(node.rope, **{titan().LONGEST: positions})


def _upstream_module(name: str, flavor: Flavor) -> ModuleType:
    where = _where(flavor)
    known = sorted(m.name for m in pkgutil.iter_modules(torchtitan.models.__path__) if m.ispkg)
    if name not in known:
        raise EzpzError(
            f"{where}: torchtitan has no model module {name!r}.{did_you_mean(name, known)} "
            f"It has {', '.join(known)}."
        )
    try:
        module = importlib.import_module(f"torchtitan.models.{name}")
    except ImportError as error:
        # Whoever installs it would be refused afterwards.
        if requires_images(name):
            raise EzpzError(
                f"{_needs_images(flavor)} That needs what is not installed here: {error}."
            ) from error
        raise EzpzError(
            f"{where}: torchtitan's {name} cannot be imported here: {error}. Install what it needs."
        ) from error
    if not hasattr(module, "model_registry"):
        raise EzpzError(f"{where}: torchtitan's {name} is not a model.")
    return module


def _upstream_flavors(module: ModuleType) -> list[str]:
    """Return the names in the module's ``..._configs`` dict, where each model keeps its flavors."""
    tables = (value for name, value in vars(module).items() if name.endswith("_configs"))
    return [flavor for table in tables if isinstance(table, dict) for flavor in table]
