"""``ezpz-moe flavors``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import get_args

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import import_host
from ezpz_moe.cli.command import Reporting


@dataclass(frozen=True)
class Flavors(Reporting):
    """List the model flavors, smallest first, with their parameters, experts and backend."""

    group = "models"

    def run(self) -> int:
        from ezpz_moe.compute.names import known_backend_names
        from ezpz_moe.config.flavor_schema import Attention
        from ezpz_moe.config.flavors import flavor_names, load_flavor

        # Before torch is imported: a mistake in a file is reported at once.
        flavors = [load_flavor(name) for name in flavor_names()]
        with display.status("Building the models on the meta device, to count"):
            summarize = import_host().summarize
            counted = [(summarize(flavor), flavor) for flavor in flavors]
            counted.sort(key=lambda pair: pair[0].total)
            found = [
                {
                    "name": flavor.name,
                    **asdict(model),
                    "attention": flavor.attention,
                    "backend": flavor.compute_backend,
                }
                for model, flavor in counted
            ]
            rows = [
                {
                    "flavor": flavor.name,
                    "total": display.count(model.total),
                    "active": display.count(model.active),
                    "experts": model.num_experts,
                    "top-k": model.top_k,
                    "expert dim": model.expert_hidden_dim,
                    "layers": model.n_layers,
                    "dim": model.dim,
                    "attention": flavor.attention or "the host's",
                    "backend": flavor.compute_backend,
                }
                for model, flavor in counted
            ]
        display.print_json({"flavors": found})
        important = ["total", "active", "experts", "top-k", "backend", "layers", "dim"]
        display.print_table(rows, important=important)
        attentions, backends = ", ".join(get_args(Attention)), ", ".join(known_backend_names())
        display.print_line(
            "Variants of each: FLAVOR[_ATTENTION][_BACKEND], such as 16B_sdpa_for_loop. "
            f"ATTENTION: {attentions}. BACKEND: {backends}."
        )
        return 0


COMMAND = Flavors
