"""Change a trainer's config as its command line would, to look at it. The same for all hosts."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import TypeVar

import tyro
from torchtitan.config.manager import ConfigManager, custom_registry

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.command_line import text_of_box

T = TypeVar("T")


def changed_by(config: T, host_flags: Sequence[str]) -> T:
    """Return a copy of the host's ``config`` with its own flags; every part checks its copy.

    Raises:
        EzpzError: the trainer does not take these flags, in the words of its parser.
    """
    # What the host's flags look like. Its ConfigManager does the same when it is made.
    ConfigManager.register_tyro_rules(custom_registry)
    with _mistakes_in_one_line():
        return tyro.cli(
            type(config), args=list(host_flags), default=config, registry=custom_registry
        )


@contextlib.contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    """Raise what tyro would print in a box, for it ends the process then.

    Raises:
        EzpzError: what stands in the box.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit:
        raise EzpzError(
            f"{text_of_box(printed.getvalue())} (a flag of the trainer; `ezpz-moe train "
            "--help-trainer` lists them)"
        ) from None
