"""Write the parameter table of docs/flavors.md from the shipped flavors.

    python scripts/make_flavor_table.py           rewrite the table
    python scripts/make_flavor_table.py --check   exit with 1 if it is not up to date

Each model is built on the meta device, so no memory is needed and it takes seconds.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import tyro

from ezpz_moe import display
from ezpz_moe.flavors import FOLDER_VARIABLE, flavor_names, load_flavor
from ezpz_moe.hosts import binding
from ezpz_moe.hosts.model_summary import ModelSummary

DOCUMENT = Path(__file__).parent.parent / "docs" / "flavors.md"
TABLE = re.compile(r"(?<=<!-- table: begin -->\n).*(?=<!-- table: end -->)", re.DOTALL)
HEADER = (
    "flavor",
    "dim D",
    "layers",
    "experts E",
    "top-k",
    "expert F",
    "total",
    "active",
    "embedding",
)


def summaries() -> dict[str, ModelSummary]:
    """The shipped flavors without their variants, the smallest first."""
    os.environ.pop(FOLDER_VARIABLE, None)
    summarize = binding("parameters").summarize
    flavors = [load_flavor(name) for name in flavor_names()]
    named = {f.name: summarize(f) for f in flavors if f.name == f.source.stem}
    return dict(sorted(named.items(), key=lambda item: item[1].total))


def table() -> str:
    """The whole table in Markdown."""
    rows: list[tuple[object, ...]] = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1)]
    for name, model in summaries().items():
        sizes = (model.dim, model.n_layers, model.num_experts, model.top_k, model.expert_hidden_dim)
        counts = map(display.count, (model.total, model.active, model.embedding))
        rows.append((f"`{name}`", *sizes, *counts))
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def main(check: bool = False) -> int:
    """Write the parameter table of docs/flavors.md.

    Args:
        check: write nothing; exit with 1 if the table is not up to date.
    """
    written = DOCUMENT.read_text()
    fresh = TABLE.sub(lambda _: table(), written)
    if not check:
        DOCUMENT.write_text(fresh)
    elif fresh != written:
        print(f"{DOCUMENT} is stale. Run: python scripts/make_flavor_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
