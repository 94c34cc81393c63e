"""The base class of every command."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar

GROUPS = ("models", "backends", "before a run", "weights", "after a run", "runs")
"""Groups of related commands, in the order of the help."""


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

    def refuse_wrong_flags(self) -> None:
        """Refuse flags that the trainer would refuse, before anything heavy is imported.

        Raises:
            EzpzError: the trainer does not take them, or not with these values.
        """
        words = getattr(self, "host_flags", ())
        if words:
            from ezpz_moe.tools.trainer_flags import refuse_wrong_flags

            ours = (f"--{each.name.replace('_', '-')}" for each in fields(self))  # type: ignore[arg-type]
            refuse_wrong_flags(words, [*ours, "--debug"])

    @classmethod
    def takes_host_flags(cls) -> bool:
        # Asked of the class: the arguments are parsed only after this is known.
        return "host_flags" in {each.name for each in fields(cls)}  # type: ignore[arg-type]
