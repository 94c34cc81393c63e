"""Tables in the documents, between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        _standing(fresh, document, name)
        fresh = _place(name).sub(lambda _, table=table: table, fresh)
    if not check:
        path.write_text(fresh)
    elif fresh != written:
        print(f"{document} is stale. Run: python {sys.argv[0]}", file=sys.stderr)
        return 1
    return 0


def with_prose(
    document: str, name: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield the rows with their cells of ``columns``, which people write into the table itself.

    A row is known by its first cell. Those of a row that is new are empty until somebody does.
    """
    headings, *lines = _cells(_standing((ROOT / document).read_text(), document, name))
    written = {cells[0]: cells for cells in lines}
    for row in rows:
        cells = dict(zip(headings, written.get(str(next(iter(row.values()))), ()), strict=False))
        yield {**row, **{column: cells.get(column, "") for column in columns}}


def without(table: str, columns: Iterable[str]) -> list[str]:
    """Return the first cells of the rows of a table that have nothing in one of ``columns``."""
    headings, *rows = _cells(table) or [[]]
    places = [headings.index(column) for column in columns if column in headings]
    return [cells[0] for cells in rows if not all(cells[place] for place in places)]


def _place(name: str) -> re.Pattern[str]:
    between = rf"(?<=<!-- {re.escape(name)}: begin -->\n).*(?=<!-- {re.escape(name)}: end -->)"
    return re.compile(between, re.DOTALL)


def _standing(text: str, document: str, name: str) -> str:
    """Return what stands in the place of a table."""
    found = _place(name).search(text)
    if not found:
        raise ValueError(f"{document}: has no place for the table {name!r}")
    return found.group()


def _cells(table: str) -> list[list[str]]:
    """Return the cells of a table in Markdown, its headings first."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
