"""Write the parameter table of docs/reference/flavors.md from the shipped flavors.

    python scripts/make_flavor_table.py           rewrite the table
    python scripts/make_flavor_table.py --check   exit with 1 if it is not up to date

Each model is built on the meta device, so no memory is needed and it takes seconds.
"""

from __future__ import annotations

import os
import sys

import tables
import tyro

from ezpz_moe.cli import display
from ezpz_moe.config.flavors import FOLDER_VARIABLE, flavor_names, load_flavor
from ezpz_moe.config.layer_sizes import in_words
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.model_summary import ModelSummary


def summaries() -> dict[str, ModelSummary]:
    """The shipped flavors, the smallest first."""
    os.environ.pop(FOLDER_VARIABLE, None)
    summarize = host().summarize
    flavors = [load_flavor(name) for name in flavor_names()]
    named = {flavor.name: summarize(flavor) for flavor in flavors}
    return dict(sorted(named.items(), key=lambda item: item[1].total))


def table() -> str:
    """The whole table in Markdown."""
    rows = [
        {
            "flavor": f"`{name}`",
            "dim D": model.dim,
            "layers": model.n_layers,
            "experts E": in_words(model.num_experts),
            "top-k": in_words(model.top_k),
            "expert F": in_words(model.expert_hidden_dim),
            "total": display.count(model.total),
            "active": display.count(model.active),
            "embedding": display.count(model.embedding),
        }
        for name, model in summaries().items()
    ]
    return tables.markdown(rows, right=rows[0].keys() - {"flavor"})


def main(check: bool = False) -> int:
    """Write the parameter table of docs/reference/flavors.md.

    Args:
        check: write nothing; exit with 1 if the table is not up to date.
    """
    return tables.update("docs/reference/flavors.md", {"table": table()}, check=check)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
