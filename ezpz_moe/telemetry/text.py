"""Tables and figures as text for people, from plain values: for the terminal and for logs."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNLIMITED = 10_000
"""Columns of what is no terminal. Without one to ask, rich would wrap at 80."""

_FIGURE = re.compile(r"[-+<]?\d")


def words(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows with every cell as it is printed."""
    return [{heading: text(value) for heading, value in row.items()} for row in rows]


def has_figures(rows: Sequence[Mapping[str, str]], heading: str) -> bool:
    """Return whether a column holds numbers, with or without a unit; a dash is a missing one."""
    # The first column names the row, also where a name begins with a digit, such as 16B.
    if heading == next(iter(rows[0])):
        return False
    cells = [row[heading] for row in rows if row[heading] != "-"]
    return bool(cells) and all(map(_FIGURE.match, cells))


def table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return rows of :func:`words`, at least one, as a table of any width without lines.

    The keys are its headings. Columns of numbers align right.
    """
    made = Table(box=None, header_style="bold")
    for heading in rows[0]:
        made.add_column(
            escape(heading.replace("_", " ")),
            justify="right" if has_figures(rows, heading) else "left",
            no_wrap=True,
        )
    for row in rows:
        # Escaped: rich would take [router] in a cell for a style, and leave it out.
        made.add_row(*map(escape, row.values()))
    return made


def plain_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the lines of such a table for a log: never wrapped, without colours."""
    # The environment may force colours on whatever is printed (FORCE_COLOR).
    log = Console(file=io.StringIO(), width=UNLIMITED, force_terminal=False, color_system=None)
    made = words(rows)
    with log.capture() as lines:
        log.print(table(made) if made else "", highlight=False)
    return "\n".join(line.rstrip() for line in lines.get().splitlines())


def text(value: Any) -> str:
    """Return a value in words for people: yes and no, a dash for None."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        # An empty cell would look like a missing value.
        case "":
            return '""'
        case _:
            return str(value)


def gibibytes(number: int | None) -> str:
    """Format 4080218931 as "3.80 GiB"."""
    return "-" if number is None else f"{number / 2**30:.2f} GiB"


def memory(number: int) -> str:
    """Format 4080218931 as "3.80 GiB", 524288 as "0.50 MiB"."""
    # 2**27 bytes are 0.13 GiB: below that, two decimals would say too little.
    return gibibytes(number) if number >= 2**27 else f"{number / 2**20:.2f} MiB"


def memory_beside(number: int, largest: int) -> str:
    """Format memory in the unit of the largest of its table, in which all are compared."""
    size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    # What is there is not nothing.
    if 0 < number < 0.005 * size:
        return f"<0.01 {unit}"
    return f"{number / size:.2f} {unit}"


def count(parameters: int | None) -> str:
    """Format 33014016 as "33.0 M", 10240 as "10.2 k"."""
    if parameters is None:
        return "-"
    if parameters < 10**5:
        return str(parameters) if parameters < 10**3 else f"{parameters / 10**3:.1f} k"
    if parameters < 10**9:
        return f"{parameters / 10**6:.1f} M"
    return f"{parameters / 10**9:.2f} B"


def flops(number: float | None) -> str:
    """Format 118081536 as "118.08 M", with the SI prefixes of "GFLOPs"."""
    if number is None:
        return "-"
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {prefix}"
    return f"{number:.0f}"


def number(value: float | None, form: str) -> str:
    """Return a rounded figure, or a dash for None."""
    return "-" if value is None else format(value, form)
