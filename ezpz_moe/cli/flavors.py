"""``ezpz-moe flavors``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, get_args

from ezpz_moe.cli import display
from ezpz_moe.cli.command import Reporting

if TYPE_CHECKING:
    from ezpz_moe.config.flavors import Flavor
    from ezpz_moe.hosts.model_summary import ModelSummary


@dataclass(frozen=True)
class Flavors(Reporting):
    """List the model flavors, smallest first, with their parameters, experts and backend."""

    group = "models"

    def run(self) -> int:
        from ezpz_moe.compute.names import known_backend_names
        from ezpz_moe.config.flavor_schema import Attention
        from ezpz_moe.config.flavors import flavor_names, load_flavor
        from ezpz_moe.config.layer_sizes import in_words
        from ezpz_moe.hosts.counts import counts_at_hand

        flavors = [load_flavor(name) for name in flavor_names()]
        counted = sorted(((counts_at_hand(flavor), flavor) for flavor in flavors), key=_size)
        # Nothing is built here: a list has to be there at once.
        rows = [
            {
                "flavor": flavor.name,
                "total": model and display.count(model.total),
                "active": model and display.count(model.active),
                "experts": model and in_words(model.num_experts),
                "top-k": model and in_words(model.top_k),
                "expert dim": model and in_words(model.expert_hidden_dim),
                "layers": model and model.n_layers,
                "dim": model and model.dim,
                "attention": flavor.attention or "the host's",
                "backend": "" if flavor.is_dense else flavor.compute_backend,
            }
            for model, flavor in counted
        ]
        found = [
            {
                "name": flavor.name,
                **(asdict(model) if model else {}),
                "attention": flavor.attention,
                "backend": None if flavor.is_dense else flavor.compute_backend,
            }
            for model, flavor in counted
        ]
        display.print_json({"flavors": found})
        important = ["total", "active", "experts", "top-k", "backend", "layers", "dim"]
        display.print_table(rows, important=important)
        if unknown := [flavor.name for model, flavor in counted if model is None]:
            display.print_line(
                f"Not counted here: {', '.join(unknown)}. `ezpz-moe describe {unknown[0]}` builds "
                "the model and counts."
            )
        attentions, backends = ", ".join(get_args(Attention)), ", ".join(known_backend_names())
        display.print_line(
            "Variants of each: FLAVOR[_ATTENTION][_BACKEND], such as 16B_sdpa_for_loop. "
            f"ATTENTION: {attentions}. BACKEND: {backends}."
        )
        return 0


COMMAND = Flavors


def _size(counted: tuple[ModelSummary | None, Flavor]) -> float:
    """Return what to sort by: what is not counted comes last."""
    model, _ = counted
    return model.total if model else float("inf")
