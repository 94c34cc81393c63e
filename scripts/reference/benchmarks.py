"""Every archive of docs/internals/benchmarks, with the command that wrote it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import tables

PAGE = "docs/internals/benchmarks/index.md"


def made() -> dict[str, dict[str, str]]:
    """Return the table by document and name."""
    return {PAGE: {"archives": tables.markdown(_archives())}}


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
