"""What flavors say of a model that torchtitan 0.2 has no config nodes for."""

from __future__ import annotations

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.init_schema import Init
from ezpz_moe.errors import EzpzError


def refuse_other_models(flavor: Flavor) -> None:
    """Refuse a flavor whose model is made by changing the config nodes of later hosts.

    Raises:
        EzpzError: names what it says.
    """
    size = flavor.dimensions
    asked = {
        "[change]": flavor.change is not None,
        "[init]": flavor.init != Init(),
        "router_bias": size is not None and size.router_bias,
        "models without experts (dense_baseline_of, n_dense_layers = n_layers)": flavor.is_dense,
    }
    if said := [what for what, is_asked in asked.items() if is_asked]:
        raise EzpzError(
            f"{flavor.source}: {' and '.join(said)} need torchtitan 0.3 or later. Remove them, or "
            "install torchtitan 0.3."
        )
