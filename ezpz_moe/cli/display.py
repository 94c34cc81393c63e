"""Tables and lines for the terminal, from plain values. Everything here only formats.

When stdout is not a terminal, tables are plain text of unlimited width: nothing is wrapped or cut
before it reaches a file or another program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track
from rich.table import Table

T = TypeVar("T")

# Columns. Without a terminal to ask, rich would wrap at 80.
_UNLIMITED = 10_000


def output() -> Console:
    """Return the console for results."""
    # highlight would colour whatever looks like a number or a path.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_UNLIMITED)


def progress() -> Console:
    """Return the console for progress: stderr, and silent when that is not a terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


def print_table(rows: Iterable[Mapping[str, Any]], *, title: str = "") -> None:
    """Print rows with the same keys, which become the headings. Columns of numbers align right.

    Without rows, print nothing.
    """
    # As text at once: alignment and width depend on what is printed. And a list, because the rows
    # are needed twice and may come from a generator.
    rows = [{heading: text(value) for heading, value in row.items()} for row in rows]
    if not rows:
        return
    console = output()
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        header_style="bold",
        # Escaped, as the cells are: rich would take a [folder] in a path for a style.
        title=escape(title),
        title_justify="left",
    )
    for column, heading in enumerate(rows[0]):
        # The first column names the row, also where a name begins with a digit, such as 16B.
        figures = column > 0 and all(row[heading][:1].isdigit() for row in rows)
        table.add_column(
            heading.replace("_", " "),
            justify="right" if figures else "left",
            # Whole names can be copied. Elsewhere, what does not fit is folded: rich's own default
            # cuts it off.
            no_wrap=column == 0,
            overflow="fold",
        )
    for row in rows:
        # Escaped: rich would take [router] in a cell for a style, and leave it out.
        table.add_row(*map(escape, row.values()))
    console.print(table)


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Wrap the items in a progress bar that shows how many are done."""
    # transient: a bar that has ended goes away, and only the results stay.
    return track(items, description=what, total=total, console=progress(), transient=True)


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show a progress bar for ``total`` steps; call the result with a step's name as it begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        begun = 0

        def step(name: str) -> None:
            nonlocal begun
            # What begins now is not done yet, so the count rises afterwards.
            bar.update(task, completed=begun, description=f"{what}: {name}")
            begun += 1

        yield step


def print_line(line: str) -> None:
    """Print one line unwrapped, however long."""
    # No markup: messages name tables such as [router]. soft_wrap: the terminal breaks long lines,
    # so they can be copied whole.
    output().print(line, markup=False, soft_wrap=True)


def print_to_stderr(lines: str) -> None:
    """Print why something ended, unformatted."""
    # Not by progress(), which is silent when stderr is a file.
    print(lines, file=sys.stderr, flush=True)


def print_reasons(reasons: Mapping[str, Iterable[str]]) -> None:
    """Print one line per reason why a backend cannot run."""
    for name, against in reasons.items():
        for reason in against:
            print_line(f"{name}: {reason}")


def print_failures(rows: Iterable[Any]) -> None:
    """Print one line per tensor that failed."""
    for row in rows:
        where = f"{row.backend} {row.dtype} {row.routing!r} {row.tensor}"
        print_line(f"FAILED {where}: {row.verdict}")


def print_findings(findings: Sequence[Any]) -> None:
    """Print a row per finding, then a line per problem, the broken ones last."""
    print_table({"": each.state, "relied on": each.what, "for": each.used_for} for each in findings)
    with_problem = [each for each in findings if each.problem]
    # False sorts first: what is broken comes last, where the reader looks.
    for each in sorted(with_problem, key=lambda each: not each.holds):
        print_line(f"{each.state} {each.what}: {each.problem}")
        if each.meaning:
            refused = " A run is refused." if each.vital else ""
            print_line(f"  This means: {each.meaning}.{refused}")
    states = [each.state for each in findings]
    print_line(f"{states.count('holds')} hold, {states.count('BROKEN')} broken")


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


def count(parameters: int | None) -> str:
    """Format 33014016 as "33.0 M", 10240 as "10.2 k"."""
    if parameters is None:
        return "-"
    if parameters < 10**5:
        return str(parameters) if parameters < 10**3 else f"{parameters / 10**3:.1f} k"
    if parameters < 10**9:
        return f"{parameters / 10**6:.1f} M"
    return f"{parameters / 10**9:.2f} B"


def flops(number: float) -> str:
    """Format 118081536 as "118.08 M", with the SI prefixes of "GFLOPs"."""
    for size, prefix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {prefix}"
    return f"{number:.0f}"


def number(value: float | None, form: str) -> str:
    """Return a rounded figure, or a dash for None."""
    return "-" if value is None else format(value, form)
