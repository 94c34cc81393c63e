"""Refuse what flavors say of a model or of its training that torchtitan 0.2 has no place for."""

from __future__ import annotations

from ezpz_moe.config.flavor_schema import Dimensions, Flavor
from ezpz_moe.config.init_schema import Init
from ezpz_moe.errors import EzpzError


def refuse_later_keys(flavor: Flavor) -> None:
    """Refuse a flavor that needs the config nodes of later hosts.

    Raises:
        EzpzError: names what it says.
    """
    if flavor.dimensions is not None:
        refuse_uneven_layers(flavor.dimensions, str(flavor.source))
    if said := [what for what, is_asked in _of_other_models(flavor).items() if is_asked]:
        raise EzpzError(
            f"{flavor.source}: {' and '.join(said)} need torchtitan 0.3 or later. Remove them, or "
            "install torchtitan 0.3."
        )
    if flavor.other_ffns:
        raise EzpzError(
            f"{flavor.source}: {', '.join(flavor.other_ffns)} need torchtitan 0.3: remove "
            "expert_activation, expert_bias, moe_latent_dim, router_scores, ffn_activation and "
            "shared_gate, or install it."
        )
    if flavor.scores_otherwise:
        raise EzpzError(
            f'{flavor.source}: router_group_score, router_score_func = "sqrtsoftplus" and groups '
            "of one expert need torchtitan 0.3 or later. Remove them, or install torchtitan 0.3."
        )
    if flavor.is_routed:
        raise EzpzError(
            f"{flavor.source}: [router], [balance] and [telemetry] need torchtitan 0.3 or later. "
            "Remove these tables, or install torchtitan 0.3."
        )


def _of_other_models(flavor: Flavor) -> dict[str, bool]:
    size = flavor.dimensions
    return {
        "[change]": flavor.change is not None,
        "[init]": flavor.init != Init(),
        "overlap_shared_experts": flavor.overlap_shared_experts,
        "router_bias": size is not None and size.router_bias,
        "models without experts (dense_baseline_of, n_dense_layers = n_layers)": flavor.is_dense,
    }


def refuse_uneven_layers(size: Dimensions, where: str) -> None:
    """Refuse layers that differ, but for the first ones, which may be dense.

    Raises:
        EzpzError: after ``where``, what needs a later host.
    """
    if size.is_uneven:
        raise EzpzError(
            f"{where}: num_experts, router_top_k and moe_hidden_dim: experts whose sizes differ "
            "from layer to layer need torchtitan 0.3 or later. Write numbers, or install "
            "torchtitan 0.3."
        )
    numbers = size.moe_layer_numbers
    if numbers != tuple(range(size.n_layers - len(numbers), size.n_layers)):
        raise EzpzError(
            f"{where}: moe_layers: dense layers that are not the first ones need torchtitan 0.3 or "
            "later. Write n_dense_layers, or install torchtitan 0.3."
        )
