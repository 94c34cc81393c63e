"""The base class of every command."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import ClassVar

GROUPS = ("models", "backends", "before a run", "weights", "after a run", "runs", "command line")
"""Groups of related commands, in the order of the help."""

OF_ALL = {
    "debug": "Show tracebacks.",
    "quiet": "Print results and errors only, no progress. The log of a run is its result.",
    "verbose": "Also print what the trainer and its libraries log.",
    "version": "Print the version and end.",
}
"""Options of every command, and what they do."""


class Command(ABC):
    """A command: a frozen dataclass whose fields are its arguments, named by its file's COMMAND.

    Its docstring is its help. A field ``host_flags`` lets it take the trainer's flags as well as
    its own.
    """

    # tyro takes the string below a field as its help, and without one a comment above it. So only a
    # field with a string may have a comment.
    group: ClassVar[str]
    """One of :data:`GROUPS`."""

    @abstractmethod
    def run(self) -> int:
        """Run the command and return its exit code.

        Raises:
            EzpzError: the user made a mistake.
        """

    @property
    def prints_json(self) -> bool:
        """Whether stdout may hold nothing but the JSON that the command prints."""
        return False

    @classmethod
    def takes_host_flags(cls) -> bool:
        # Asked of the class: the arguments are parsed only after this is known.
        return "host_flags" in {each.name for each in fields(cls)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reporting(Command):
    """A command whose result programs can read."""

    # Named only, so that a command's own fields may have no default.
    json: bool = field(default=False, kw_only=True)
    """Print the result to stdout as JSON, with exact figures, and nothing else there."""

    @property
    def prints_json(self) -> bool:
        return self.json
