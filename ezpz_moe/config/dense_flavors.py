"""Flavors without experts: sizes whose layers are all dense, and the dense baseline of another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.config.flavor_schema import Flavor

OF = "dense_baseline_of"
"""The key of a flavor that is the dense model of equal cost."""

_SIZES_OF_EXPERTS: dict[str, Any] = {
    "moe_hidden_dim": 1,
    "num_experts": 1,
    "num_shared_experts": 1,
    "router_top_k": 1,
    "router_score_func": "softmax",
    "router_route_scale": 1.0,
    "router_route_norm": False,
}
"""Required of a model with experts. A dense one has these values, and no layer that reads them."""

_NO_EXPERTS: dict[str, Any] = {
    **_SIZES_OF_EXPERTS,
    **dict.fromkeys(("router_num_expert_groups", "router_num_limited_groups", "shared_hidden_dim")),
    **dict.fromkeys(("router_bias", "shared_gate"), False),
}
"""What these and all other sizes are in a baseline, whose layers with experts become dense."""

OF_EXPERTS: frozenset[str] = frozenset(
    {
        *_SIZES_OF_EXPERTS,
        *("router_num_expert_groups", "router_num_limited_groups", "router_bias"),
        *("moe_layers", "shared_hidden_dim", "shared_gate", "expert_activation", "expert_bias"),
        *("moe_latent_dim", "router_scores", "overlap_shared_experts"),
        *("compute_backend", "expert_precision", "routed", "router_group_score"),
        *("router", "balance", "telemetry"),
    }
)
"""Keys and tables that say something about experts."""

_FORMULA = frozenset({"expert_activation", "expert_bias", "ffn_activation"})
"""What an FFN computes."""

_BESIDE_BASELINE = frozenset({OF, "equal", "attention"})


def all_dense(values: Mapping[str, Any]) -> bool:
    """Return whether sizes leave no layer with experts."""
    layers = values.get("n_layers")
    return layers is not None and values.get("n_dense_layers") == layers


def without_experts(
    values: Mapping[str, Any], origin: Mapping[str, Path], path: Path
) -> dict[str, Any]:
    """Return a dense flavor's values; what it inherits about experts is left out.

    Args:
        values: merged with those of the ancestors.
        origin: the file that set each.
        path: the flavor's own.

    Raises:
        EzpzError: a file that makes the model dense says something about experts.
    """
    # A file that makes the model dense, and the flavor's own: what those say, they say of this
    # model. An ancestor with experts had to say it.
    dense = {path, origin["n_dense_layers"]}
    _refuse_experts([key for key in values if origin[key] in dense], path)
    return _SIZES_OF_EXPERTS | {k: v for k, v in values.items() if k not in OF_EXPERTS}


def baseline(
    values: Mapping[str, Any], path: Path, load: Callable[[str], Flavor]
) -> dict[str, Any]:
    """Return the values of the dense model that costs as much as a flavor with experts.

    Args:
        values: of the baseline's file, which names that flavor.
        path: of the file.
        load: returns the flavor of a name.

    Raises:
        EzpzError: the file says more than which flavor, or that flavor is wrong or dense.
    """
    named = values[OF]
    where = f"{path}: {OF} = {named!r}"
    if not isinstance(named, str):
        raise EzpzError(f"{where}: should be the name of a flavor.")
    _refuse_beside_baseline(values, path)
    try:
        experts = load(named)
    except EzpzError as error:
        raise EzpzError(f"{where}: {error}") from None
    if experts.is_dense:
        raise EzpzError(f"{where}: that flavor is dense itself. Name one with experts.")
    kept = ("base", "attention", "change", "rope", "init", "ffn_activation")
    values = {key: getattr(experts, key) for key in kept} | dict(values) | {OF: experts}
    if (size := experts.dimensions) is None:
        return values
    # Or a shared gate, or sizes that differ, would ask for what only layers with experts have.
    return values | {"dimensions": size.model_copy(update=_NO_EXPERTS)}


def _refuse_beside_baseline(values: Collection[str], path: Path) -> None:
    _refuse_experts(values, path)
    if ignored := sorted(set(values) - _BESIDE_BASELINE):
        raise EzpzError(
            f"{path}: {OF} takes everything else from the flavor that it names, so these keys "
            f"would be ignored: {', '.join(ignored)}. Change them in that flavor, or in one that "
            "inherits it."
        )


def refuse_backend(variant: Mapping[str, str], name: str, path: Path) -> None:
    """Refuse the suffix of a backend in the name of a dense flavor.

    Raises:
        EzpzError: names the suffix.
    """
    if backend := variant.get("compute_backend"):
        raise EzpzError(
            f"{path}: flavor {name!r} is dense: it has no routed experts that "
            f"{backend!r} could compute. Write its name without _{backend}."
        )


def shown(flavor: Flavor) -> dict[str, Any]:
    """Return what a flavor says, without what has no use for it, or is not its model's."""
    said = flavor.model_dump(exclude_none=True)
    if flavor.dense_baseline_of is None:
        del said["equal"]
    if flavor.base is not None:
        # Unsaid, they are the host's model's own: gpt_oss has biases and another activation.
        for key in _FORMULA - flavor.model_fields_set:
            del said[key]
    if not flavor.is_dense:
        return said
    if "dimensions" in said:
        said["dimensions"] = _without(said["dimensions"])
    return _without(said)


def _without(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in OF_EXPERTS}


def refuse_dense(flavor: Flavor, what_for: str) -> None:
    """Refuse a flavor without experts where experts are what it is about.

    Args:
        flavor: any.
        what_for: what experts would be needed for, such as "to analyze".

    Raises:
        EzpzError: names the flavor.
    """
    if flavor.is_dense:
        raise EzpzError(
            f"{flavor.source}: flavor {flavor.name!r} is dense: it has no experts {what_for}. Name "
            "a flavor with experts."
        )


def _refuse_experts(keys: Collection[str], path: Path) -> None:
    if wrong := sorted(OF_EXPERTS & set(keys)):
        raise EzpzError(
            f"{path}: a dense model has no experts, so {', '.join(wrong)} would have no effect. "
            "Remove it."
        )
