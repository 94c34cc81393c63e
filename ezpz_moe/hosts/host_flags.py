"""Every flag of the installed host's command line, without importing torch or the host.

The flags of each release are shipped beside this file, with a fingerprint of the host's files that
define them. A host with other files is imported and asked (:meth:`Host.command_line`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostFlag:
    """A flag of the trainer's command line.

    Attributes:
        name: its path, such as ``training.local_batch_size``.
        type: what it takes, in the host's words: ``INT``, ``{None}|STR``, ``{full,none}``; empty
            for a switch, which is turned off by ``--training.no-NAME``.
        default: the host's own, as text; empty if there is none.
        help: what it does, in the host's words, on one line.
        after: the subcommand that has to stand before it, such as ``activation-checkpoint:full``.
    """

    name: str
    type: str
    default: str
    help: str
    after: str = ""

    @property
    def option(self) -> str:
        """As it is written: ``--training.local-batch-size``."""
        return f"--{self.name.replace('_', '-')}"


def known_flags() -> list[HostFlag]:
    """Return the flags of the installed host, in its order; only an unknown host is imported.

    Raises:
        EzpzError: no host is installed that this package has a binding for.
    """
    raise NotImplementedError
