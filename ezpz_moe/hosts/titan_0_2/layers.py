"""Refuse layers that torchtitan 0.2 cannot describe: its models have one size for all."""

from __future__ import annotations

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.errors import EzpzError


def refuse_uneven_layers(size: Dimensions, where: str) -> None:
    """Raise unless all layers after the first dense ones have the same experts.

    Raises:
        EzpzError: after ``where``, what needs a later host.
    """
    if size.is_uneven:
        raise EzpzError(
            f"{where}: num_experts, router_top_k and moe_hidden_dim: experts whose sizes differ "
            "from layer to layer need torchtitan 0.3 or later. Write numbers, or install "
            "torchtitan 0.3."
        )
    first = size.moe_layer_numbers[0]
    if size.moe_layer_numbers != tuple(range(first, size.n_layers)):
        raise EzpzError(
            f"{where}: moe_layers: dense layers that are not the first ones need torchtitan 0.3 or "
            "later. Write n_dense_layers, or install torchtitan 0.3."
        )
