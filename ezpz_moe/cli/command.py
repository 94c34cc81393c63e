"""What a command is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar

GROUPS = ("models", "backends", "before a run", "weights", "after a run", "runs")
"""Of commands that belong together in the help, in its order."""


class Command(ABC):
    """A command: a frozen dataclass whose fields are its arguments, named in its file's COMMAND.

    Its docstring is its help. With a field ``host_flags`` it takes the trainer's flags beside its
    own; with a field ``json`` it prints or writes what it found as JSON.
    """

    group: ClassVar[str]
    """Of :data:`GROUPS`."""

    @abstractmethod
    def run(self) -> int:
        """Do it, and return the exit code.

        Raises:
            EzpzError: a mistake of the user's.
        """

    @classmethod
    def takes_host_flags(cls) -> bool:
        return "host_flags" in {each.name for each in fields(cls)}  # type: ignore[arg-type]
