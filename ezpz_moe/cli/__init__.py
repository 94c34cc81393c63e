"""``ezpz-moe``: parse the arguments and run a command. Each command is one file in this folder.

Nothing heavy is imported before a command runs: help and argument mistakes are quick. Results go
to stdout, progress and errors to stderr. docs/reference/exit-codes.md has the exit codes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass, replace
from functools import partial
from pkgutil import iter_modules
from typing import Annotated, Any, Union

import tyro
from tyro.conf import CascadeSubcommandArgs, FlagCreatePairsOff, OmitArgPrefixes, arg, subcommand

from ezpz_moe import __version__
from ezpz_moe.cli import display
from ezpz_moe.cli.command import GROUPS, OF_ALL, Command
from ezpz_moe.cli.mistakes import (
    HELP,
    in_one_line,
    refuse_flags_of_trainer,
    refuse_unknown_command,
    refuse_unknown_options,
    refuse_words,
)
from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError, exit_on_user_error

_ABOUT = """Selectable expert backends for Mixture-of-Experts training with torchtitan.

The options below may stand before or after a command.
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
    # By hand, because tyro would insist on a command.
    if "--version" in arguments:
        print(f"ezpz-moe {__version__}")
        return 0
    try:
        with exit_on_user_error():
            return _run(_parse(arguments))
    # Not a mistake, so no traceback; 128 + n is how shells report signal n.
    except KeyboardInterrupt:
        display.print_to_stderr("ezpz-moe: stopped by SIGINT")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `head` has read enough; rich handles the same for tables
        # Without this, Python's own flush at exit would meet the closed pipe again and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(parsed: Any) -> int:
    # In the environment, because the processes that a command starts read it too.
    if parsed.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    display.set_mode(
        quiet=parsed.quiet, verbose=parsed.verbose, for_programs=parsed.command.prints_json
    )
    try:
        refuse_flags_of_trainer(parsed.command)
        return parsed.command.run()
    finally:
        display.set_mode()  # main() may be called again, by tests and notebooks


def _parse(arguments: Sequence[str]) -> Any:
    """Parse the command line into ``command``, with its arguments, and the options of all.

    Some commands hand flags that they do not know to the trainer; elsewhere those are mistakes.

    Raises:
        EzpzError: there is no such command or option.
    """
    known = commands()
    if arguments and arguments[0] in HELP:
        _tyro(known)(args=arguments[:1])  # ends the process
    name = refuse_unknown_command(arguments, known)
    hands_on = known[name].takes_host_flags()
    # Before tyro, which would look for another mistake: an argument missing, say.
    if not hands_on:
        refuse_unknown_options(arguments, name, known[name])
    parsed: Any
    with in_one_line(arguments, name, known[name]):
        # What is left is refused below, in one line: tyro would fill a box.
        parsed, left = _tyro(known)(args=arguments, return_unknown_args=True)
    if parsed.quiet and parsed.verbose:
        raise EzpzError("--quiet, --verbose: choose one.")
    if hands_on:
        # Commands are frozen, so a copy gets the flags.
        return replace(parsed, command=replace(parsed.command, host_flags=tuple(left)))
    refuse_words(left, name, known[name])
    return parsed


def completion_script(shell: str) -> str:
    """Return tyro's script that completes the words of a command line in this shell."""
    written = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(written):
        _tyro(commands())(args=["--tyro-write-completion", shell, "-"])
    return written.getvalue()


def _tyro(known: dict[str, type[Command]]) -> Callable[..., Any]:
    return partial(
        tyro.cli,
        _arguments(known),
        prog="ezpz-moe",
        config=(
            CascadeSubcommandArgs,  # --debug may also follow the command
            FlagCreatePairsOff,  # no --no-debug beside --debug
            OmitArgPrefixes,  # --device, not --command.device
        ),
    )


def _arguments(known: dict[str, type[Command]]) -> type:
    # Named after the file: tyro would derive a name from the class.
    of_a_command = tuple(Annotated[command, subcommand(name)] for name, command in known.items())
    return make_dataclass(
        "Arguments",
        [
            ("command", Union[of_a_command]),  # noqa: UP007 - the members are known only here
            *(
                (name, Annotated[bool, arg(help=said)], field(default=False))
                for name, said in OF_ALL.items()
            ),
        ],
        frozen=True,
        namespace={"__doc__": _ABOUT},  # tyro prints it at the top of the help
    )
