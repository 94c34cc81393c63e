"""Tables in the documents, between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def markdown(rows: Iterable[Mapping[str, Any]], right: Iterable[str] = ()) -> str:
    """Rows with the same keys, which are the headings; columns in ``right`` stand on the right."""
    rows = list(rows)
    headings = list(rows[0]) if rows else []
    rules = ["---:" if heading in set(right) else "---" for heading in headings]
    lines = [headings, rules, *([row[heading] for heading in headings] for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines if line)


def update(document: str, tables: Mapping[str, str], *, check: bool) -> int:
    """Put the tables into their places, or with ``check`` tell whether they stand there already.

    Returns:
        The exit code: 1 when ``check`` finds a table that is out of date.
    """
    path = ROOT / document
    written = fresh = path.read_text()
    for name, table in tables.items():
        place = re.compile(rf"(?<=<!-- {name}: begin -->\n).*(?=<!-- {name}: end -->)", re.DOTALL)
        if not place.search(fresh):
            raise ValueError(f"{document}: has no place for the table {name!r}")
        fresh = place.sub(lambda _, table=table: table, fresh)
    if not check:
        path.write_text(fresh)
    elif fresh != written:
        print(f"{document} is stale. Run: python {sys.argv[0]}", file=sys.stderr)
        return 1
    return 0
