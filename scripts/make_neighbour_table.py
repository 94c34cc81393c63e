"""Write the table of what a backend does beside the host's models, converters and dispatchers.

    python scripts/make_neighbour_table.py            rewrite the table
    python scripts/make_neighbour_table.py --check    exit with 1 if it is out of date

It tries every combination with the installed torchtitan and needs torchao, whose converters are
among them: ``nox -s torchao`` has it.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import tables
import tyro

sys.path.append(str(tables.ROOT / "tests"))

import neighbour_cases as cases

from ezpz_moe.compute import backend_names

Row = tuple[frozenset[str], ...]
"""Of every column of a cell the values that it stands for."""

ALL = cases.Cell(
    model=tuple(cases.MODELS),
    door=cases.DOORS,
    backend=tuple(backend_names()),
    beside=cases.BESIDE,
    dispatcher=cases.DISPATCHERS,
)
COLUMNS = ("door", "beside", "model", "dispatcher", "backend")


def outcomes() -> dict[cases.Cell, str]:
    """Try every cell."""
    with (
        tempfile.TemporaryDirectory() as folder,
        cases.stand_in(*cases.GATED_DELTA_NET, *cases.IMAGES),
    ):
        return {cell: cases.tried(cell, Path(folder)) for cell in cases.cells(with_torchao=True)}


def joined(found: Mapping[cases.Cell, str]) -> dict[Row, str]:
    """Rows for cells: those that differ in one column alone, and come to the same, become one."""
    rows = {tuple(frozenset([value]) for value in cell): how for cell, how in found.items()}
    for column in map(cases.Cell._fields.index, ("backend", "dispatcher", "model", "beside")):
        alike = defaultdict(list)
        for row, how in rows.items():
            alike[(*row[:column], *row[column + 1 :]), how].append(row[column])
        rows = {
            (*rest[:column], frozenset().union(*values), *rest[column:]): how
            for (rest, how), values in alike.items()
        }
    return rows


def table(rows: Mapping[Row, str]) -> str:
    """The rows in the order of the cells' values."""
    lines = []
    for row, how in rows.items():
        cell = cases.Cell(*row)
        ordered = {
            name: [value for value in getattr(ALL, name) if value in getattr(cell, name)]
            for name in COLUMNS
        }
        where = [[getattr(ALL, name).index(value) for value in ordered[name]] for name in COLUMNS]
        words = {
            name: "every" if len(values) == len(getattr(ALL, name)) else ", ".join(values)
            for name, values in ordered.items()
        }
        lines.append((where, words | {"what happens": how}))
    return tables.markdown(words for _, words in sorted(lines, key=lambda line: line[0]))


def main(check: bool = False) -> int:
    """Write the table of neighbours in docs/internals/hosts.md.

    Args:
        check: write nothing; exit with 1 if it is out of date.
    """
    if find_spec("torchao") is None:
        print("torchao is not installed. Run: nox -s torchao", file=sys.stderr)
        return 1
    logging.disable(logging.WARNING)
    neighbours = {"neighbours": table(joined(outcomes()))}
    return tables.update("docs/internals/hosts.md", neighbours, check=check)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
