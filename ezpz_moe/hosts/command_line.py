"""Read a command line that tyro makes of a config: its flags, what each takes, its default.

And its word on a mistake.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from typing import Any

_RULE = re.compile("[─╰-]{3}")


@dataclass(frozen=True)
class HostFlag:
    """A flag of the trainer's command line.

    Attributes:
        name: its path, such as ``training.local_batch_size``.
        type: what it takes, in the host's words: ``INT``, ``{None}|STR``, ``{full,none}``; empty
            for a switch, which ``--training.no-NAME`` turns off.
        default: what holds without it, as text; empty if that depends on the job or the machine.
        help: what it does, in the host's words, on one line.
        many: whether it takes any number of values.
        after: the subcommand that has to stand before it, such as ``activation-checkpoint:full``.
        is_subcommand: whether it is such a subcommand, a word without ``--``.
    """

    name: str
    type: str
    default: str
    help: str
    many: bool = False
    after: str = ""
    is_subcommand: bool = False

    @property
    def option(self) -> str:
        """As it is written: ``--training.local-batch-size``."""
        return self.name if self.is_subcommand else f"--{self.name.replace('_', '-')}"


def flags_of(config_class: type, config: Any, registry: Any) -> list[HostFlag]:
    """Return the flags of ``config_class`` with the defaults of ``config``, in the help's order.

    Args:
        config_class: a dataclass, which tyro makes a command line of.
        config: an instance of it.
        registry: tyro's registry of the types that it reads in a way of its own.
    """
    from tyro.extras import get_parser

    with warnings.catch_warnings():
        # tyro would rather have this done by its own command line, which prints and parses only.
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = get_parser(config_class, default=config, registry=registry)
    return list(_flags(parser))


def text_of_box(printed: str) -> str:
    """Return what tyro says in the box that it prints about a mistake, on one line."""
    # The border has the kind of mistake. What follows a rule is help, which --help has too.
    lines = (line.strip("│ ") for line in printed.splitlines()[1:])
    # Where stdout is not UTF-8, the box has no sides, and a rule below its first line.
    return " ".join(takewhile(lambda line: not _RULE.match(line), dropwhile(_RULE.match, lines)))


def _flags(parser: Any, after: str = "") -> Iterator[HostFlag]:
    """Yield the flags of a parser that tyro made, argparse's in all but its type."""
    for action in parser._actions:
        if not action.option_strings:  # subcommands
            for name, inner in (action.choices or {}).items():
                yield HostFlag(name, "", "", _line(inner.description), is_subcommand=True)
                yield from _flags(inner, name)
        elif "--help" not in action.option_strings:
            yield _flag(action, after)


def _flag(action: argparse.Action, after: str) -> HostFlag:
    name = action.option_strings[0].removeprefix("--").replace("-", "_")
    # tyro writes what each does and its default as one text.
    said = _line(action.help)
    match = re.fullmatch(r"(.*?) ?\((?:default|required)(?:: (.*))?\)", said)
    text, default = (match[1], match[2] or "") if match else (said, "")
    metavar = "" if action.nargs == 0 else str(action.metavar)
    return HostFlag(name, metavar, default, text, many=action.nargs == "*", after=after)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
