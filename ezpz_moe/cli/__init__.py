"""``ezpz-moe``: parse the arguments and run a command. Each command is one file in this folder.

Nothing heavy is imported before a command runs: help and argument mistakes are quick. Results go
to stdout, progress and errors to stderr. Exit codes: 0; 1 when a check fails or a training run
breaks; 2 for a user's mistake; 128 + n when signal n ended it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import field, make_dataclass, replace
from functools import partial
from pkgutil import iter_modules
from typing import Annotated, Any, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, FlagCreatePairsOff, OmitArgPrefixes, arg, subcommand

from ezpz_moe import __version__
from ezpz_moe.cli import display
from ezpz_moe.cli.command import GROUPS, Command
from ezpz_moe.errors import DEBUG_VARIABLE, exit_on_user_error

_ABOUT = """Selectable expert backends for Mixture-of-Experts training with torchtitan.

ezpz-moe --version prints the version.
"""


def commands() -> dict[str, type[Command]]:
    """Return every command by name, in the help's order: the files here with a ``COMMAND``."""
    # All files are imported even to run one, because tyro parses with all commands. That is quick:
    # they import torch and the host only in run().
    modules = {
        each.name: importlib.import_module(f"{__name__}.{each.name}")
        for each in iter_modules(__path__)
        if each.name != "__main__"
    }
    found = {name: module.COMMAND for name, module in modules.items() if hasattr(module, "COMMAND")}
    # sorted() is stable: within a group commands keep the order of their files' names.
    return dict(sorted(found.items(), key=lambda item: GROUPS.index(item[1].group)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argument mistakes exit with 2 at once."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # By hand, because tyro would insist on a command. Only on its own: after a command the flag may
    # be the trainer's.
    if list(arguments) == ["--version"]:
        print(f"ezpz-moe {__version__}")
        return 0
    try:
        parsed = _parse(arguments)
    except BrokenPipeError:  # `head` stopped reading the help; rich handles the same for tables
        # Without this, Python's own flush at exit would meet the closed pipe again and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # In the environment, because the processes that a command starts read it too.
    if parsed.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        with exit_on_user_error():
            parsed.command.refuse_wrong_flags()
            return parsed.command.run()
    # Not a mistake, so no traceback; 128 + n is how shells report signal n.
    except KeyboardInterrupt:
        display.print_to_stderr("ezpz-moe: stopped by SIGINT")
        return 128 + signal.SIGINT


def _parse(arguments: Sequence[str]) -> Any:
    """Parse the command line into ``command``, with its arguments, and ``debug``.

    Some commands hand flags that they do not know to the trainer; elsewhere those are mistakes.
    """
    known = commands()
    # The first word is the command: --debug, the only flag before it, takes no value.
    words = [argument for argument in arguments if not argument.startswith("-")]
    parse = partial(
        tyro.cli,
        _arguments(known),
        prog="ezpz-moe",
        args=arguments,
        config=(
            CascadeSubcommandArgs,  # --debug may also follow the command
            FlagCreatePairsOff,  # no --no-debug beside --debug
            OmitArgPrefixes,  # --device, not --command.device
        ),
    )
    # Only for these commands: elsewhere a misspelt flag would be ignored in silence.
    if not (words and words[0] in known and known[words[0]].takes_host_flags()):
        return parse()
    parsed, host_flags = parse(return_unknown_args=True)
    # Commands are frozen, so a copy gets the flags.
    return replace(parsed, command=replace(parsed.command, host_flags=tuple(host_flags)))


def _arguments(known: dict[str, type[Command]]) -> type:
    # Named after the file: tyro would derive a name from the class.
    of_a_command = tuple(Annotated[command, subcommand(name)] for name, command in known.items())
    return make_dataclass(
        "Arguments",
        [
            ("command", Union[of_a_command]),  # noqa: UP007 - the members are known only here
            ("debug", Annotated[bool, arg(help="Show tracebacks.")], field(default=False)),
        ],
        frozen=True,
        namespace={"__doc__": _ABOUT},  # tyro prints it at the top of the help
    )
