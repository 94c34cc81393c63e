"""Tables and lines for the terminal, from plain values. Everything here only formats.

When stdout is not a terminal, tables are plain text of unlimited width: nothing is wrapped or cut
before it reaches a file or another program.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import Event, Thread
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

from ezpz_moe.cli import tables

# Commands ask this module alone for words; logs need some of them too.
from ezpz_moe.telemetry.text import (
    UNLIMITED,
    count,
    flops,
    gibibytes,
    memory_beside,
    number,
    table,
    text,
    words,
)

__all__ = ["count", "flops", "gibibytes", "memory_beside", "number", "text"]

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds without a word of progress in a log."""


@dataclass(frozen=True)
class _Mode:
    quiet: bool = False
    verbose: bool = False
    for_programs: bool = False


_mode = _Mode()


def set_mode(*, quiet: bool = False, verbose: bool = False, for_programs: bool = False) -> None:
    """Choose what is printed from here on.

    Args:
        quiet: no progress, and none of the trainer's remarks.
        verbose: also all that the trainer and its libraries log.
        for_programs: on stdout nothing but what :func:`print_json` prints.
    """
    global _mode
    _mode = _Mode(quiet, verbose, for_programs)


def set_log_level() -> None:
    """Silence what the host logs on the root logger, unless the user wants to see it."""
    if _mode.verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        logging.getLogger().setLevel(logging.ERROR)


def output() -> Console:
    """Return the console for results."""
    # highlight would colour whatever looks like a number or a path.
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=UNLIMITED)


def progress() -> Console:
    """Return the console for progress: stderr, and silent when that is not a terminal."""
    console = Console(stderr=True)
    console.quiet = _mode.quiet or not console.is_terminal
    return console


def print_table(
    rows: Iterable[Mapping[str, Any]], *, title: str = "", important: Sequence[str] = ()
) -> None:
    """Print rows with the same keys, which become the headings. Columns of numbers align right.

    A terminal that is too narrow for all columns shows the most ``important`` ones, or a block for
    each row. Without rows, print nothing.
    """
    # As text at once: alignment and width depend on what is printed.
    if _mode.for_programs or not (made := words(rows)):
        return
    console = output()
    if title:
        console.print(title, markup=False, style="bold")
    if not console.is_terminal:
        console.print(table(made))
        return
    if (widths := tables.fit(made, console.width, important)) is None:
        for line in tables.blocks(made, console.width):
            console.print(line, markup=False, soft_wrap=True)
        return
    console.print(tables.fitted(made, widths))
    if hidden := [each.replace("_", " ") for each in made[0] if each not in widths]:
        several = "s" if len(hidden) > 1 else ""
        note = f"{len(hidden)} column{several} hidden: {', '.join(hidden)}"
        console.print(f"{note} (wider terminal, or --json)", markup=False, style="dim")


@contextmanager
def stdout_of_others() -> Iterator[None]:
    """Send to stderr what processes that are started here print, if stdout is for programs."""
    if not _mode.for_programs:
        yield
        return
    # The file descriptor, which a process inherits, and not Python's own sys.stdout.
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)


def print_json(document: Any) -> None:
    """Print the result for programs, if it is one that asks; nothing else is printed then."""
    if _mode.for_programs:
        print(json_text(document), flush=True)  # here, where a closed pipe is met


def json_text(document: Any) -> str:
    """Return a document as JSON: figures that are not finite are null, for which it has no name."""
    return json.dumps(_finite(document), indent=2, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float():
            return value if math.isfinite(value) else None
    return value


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items, and show how many are done: a bar, or a line now and then in a file."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    done = 0
    # transient: a bar that has ended goes away, and only the results stay.
    with _told(lambda: f"{what}: {done}{f' of {total}' if total else ''} done"):
        bar = track(items, description=what, total=total, console=progress(), transient=True)
        for item in bar:
            yield item
            done += 1


@contextmanager
def steps(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show progress for ``total`` steps; call the result with a step's name as it begins."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    begun, now = 0, ""
    with (
        Progress(*columns, console=progress(), transient=True) as bar,
        _told(lambda: f"{what}: {now}, {begun} of {total}"),
    ):
        task = bar.add_task(what, total=total)

        def step(name: str) -> None:
            nonlocal begun, now
            # What begins now is not done yet, so the count rises afterwards.
            bar.update(task, completed=begun, description=f"{what}: {name}")
            begun, now = begun + 1, name

        yield step


@contextmanager
def status(what: str) -> Iterator[None]:
    """Show that something is going on that may take a while."""
    with progress().status(f"{what} ..."), _told(lambda: what):
        yield


@contextmanager
def _told(state: Callable[[], str]) -> Iterator[None]:
    """Write a line of the state now and then where no terminal shows a bar, such as to a log."""
    if _mode.quiet or Console(stderr=True).is_terminal:
        yield
        return
    begun, ended = time.monotonic(), Event()

    def tell() -> None:
        while not ended.wait(PATIENCE):
            print_to_stderr(f"{state()}, after {time.monotonic() - begun:.0f} s")

    # daemon: whatever ends the work must not wait for a line.
    Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def print_line(line: str) -> None:
    """Print a line of prose: on a terminal, it wraps between words, and indents what follows."""
    if (console := output()).is_terminal:
        wrapped = (tables.wrapped(each, console.width) for each in line.split("\n"))
        line = "\n".join(chain.from_iterable(wrapped))
    print_whole(line)


def print_whole(line: str) -> None:
    """Print a line to be copied, such as a command, unwrapped however long."""
    if _mode.for_programs:
        return
    # No markup: messages name tables such as [router]. soft_wrap: the terminal breaks long lines.
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
        where = f"{row.backend} {row.dtype} {row.entry} {row.routing!r} {row.ffn} {row.tensor}"
        print_line(f"FAILED {where}: {row.verdict}")
