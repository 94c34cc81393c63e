"""Tables and lines for the terminal, from plain values. Everything here only formats.

When stdout is not a terminal, tables are plain text of unlimited width: nothing is wrapped or cut
before it reaches a file or another program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

# Commands ask this module alone for words; logs need some of them too.
from ezpz_moe.telemetry.text import (
    UNLIMITED,
    count,
    flops,
    gibibytes,
    memory,
    number,
    table,
    text,
)

__all__ = ["count", "flops", "gibibytes", "memory", "number", "text"]

T = TypeVar("T")


def output() -> Console:
    """Return the console for results."""
    # highlight would colour whatever looks like a number or a path.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=UNLIMITED)


def progress() -> Console:
    """Return the console for progress: stderr, and silent when that is not a terminal."""
    console = Console(stderr=True)
    console.quiet = not console.is_terminal
    return console


def print_table(rows: Iterable[Mapping[str, Any]], *, title: str = "") -> None:
    """Print rows with the same keys, which become the headings. Columns of numbers align right.

    Without rows, print nothing.
    """
    console = output()
    lines = box.SIMPLE_HEAD if console.is_terminal else None
    if (made := table(rows, title=title, box=lines)) is not None:
        console.print(made)


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
        where = f"{row.backend} {row.dtype} {row.entry} {row.routing!r} {row.tensor}"
        print_line(f"FAILED {where}: {row.verdict}")
