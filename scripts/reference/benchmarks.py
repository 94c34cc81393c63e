"""Every archive of docs/internals/benchmarks, with its command; and the tables of some of them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import tables

PAGE = "docs/internals/benchmarks/index.md"
METHODS = "docs/internals/benchmarks/methods.md"
EXPERTS = "docs/guides/experts.md"
ROUTING = "docs/reference/routing.md"
NEIGHBOURS = "docs/internals/benchmarks/neighbours.json"


def made() -> dict[str, dict[str, str]]:
    """Return the tables by document and name."""
    neighbours = json.loads((tables.ROOT / NEIGHBOURS).read_text())["table"]
    return {
        PAGE: {"archives": tables.markdown(_archives())},
        METHODS: {
            "methods": _table("methods", "method"),
            "neighbours": tables.markdown(neighbours, right=neighbours[0].keys() - {"losses"}),
        },
        EXPERTS: {"fine-tune": _table("fine_tune", "what learns")},
        ROUTING: {"rerouting": _table("rerouting", "strength")},
    }


def _table(archive: str, first: str) -> str:
    """Return an archive's own table, with numbers in all columns but the first."""
    file = (tables.ROOT / PAGE).with_name(f"{archive}.json")
    rows = json.loads(file.read_text())["table"]
    return tables.markdown(rows, right=rows[0].keys() - {first})


def _archives() -> Iterator[dict[str, str]]:
    folder = (tables.ROOT / PAGE).parent
    for path in sorted(folder.rglob("*.json")):
        archive = json.loads(path.read_text())
        name = path.relative_to(folder)
        about = archive.get("environment", archive)
        yield {
            "archive": f"[{name}]({name})",
            "date": about["date"][:10],
            "command": f"`{archive['command']}`",
        }
