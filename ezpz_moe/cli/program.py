"""``ezpz-moe``: arguments in, calls out. Commands gather plain rows; ``display`` formats them.

Nothing heavy is imported before a command runs, so that help and argument mistakes are quick.
Results go to stdout, progress and errors to stderr. Exit codes: 0; 1 when a check fails or a
training run breaks; 2 for a mistake of the user's; 128 + n when signal n ended it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import tyro
from tyro.conf import CascadeSubcommandArgs, FlagCreatePairsOff, OmitArgPrefixes, subcommand

from ezpz_moe import __version__
from ezpz_moe.commands.analyze import Analyze
from ezpz_moe.commands.backends import Backends
from ezpz_moe.commands.bench import Bench
from ezpz_moe.commands.checkpoint import Checkpoint
from ezpz_moe.commands.convert import Convert
from ezpz_moe.commands.describe import Describe
from ezpz_moe.commands.doctor import Doctor
from ezpz_moe.commands.flavors import Flavors
from ezpz_moe.commands.plot import Plot
from ezpz_moe.commands.preflight import Preflight
from ezpz_moe.commands.show import Show
from ezpz_moe.commands.train import Train
from ezpz_moe.commands.tune import Tune
from ezpz_moe.commands.upcycle import Upcycle
from ezpz_moe.commands.verify import Verify
from ezpz_moe.errors import DEBUG_VARIABLE, exit_on_user_error


@dataclass(frozen=True)
class Arguments:
    """Selectable expert backends for Mixture-of-Experts training with torchtitan.

    ezpz-moe --version prints the version.
    """

    command: (
        Annotated[Flavors, subcommand("flavors")]
        | Annotated[Show, subcommand("show")]
        | Annotated[Describe, subcommand("describe")]
        | Annotated[Backends, subcommand("backends")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Bench, subcommand("bench")]
        | Annotated[Doctor, subcommand("doctor")]
        | Annotated[Preflight, subcommand("preflight")]
        | Annotated[Checkpoint, subcommand("ckpt")]
        | Annotated[Upcycle, subcommand("upcycle")]
        | Annotated[Analyze, subcommand("analyze")]
        | Annotated[Convert, subcommand("convert")]
        | Annotated[Plot, subcommand("plot")]
        | Annotated[Tune, subcommand("tune")]
        | Annotated[Train, subcommand("train")]
    )
    debug: bool = False
    """Show tracebacks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argument mistakes exit with 2 at once."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"ezpz-moe {__version__}")
        return 0
    try:
        parsed = _parse(arguments)
    except BrokenPipeError:  # `head` has read enough of the help; rich does the same for tables
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if parsed.debug:
        os.environ[DEBUG_VARIABLE] = "1"
    try:
        with exit_on_user_error():
            return parsed.command.run()
    except KeyboardInterrupt:
        print("ezpz-moe: stopped by SIGINT", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT


def _parse(arguments: Sequence[str]) -> Arguments:
    """Some commands hand the trainer what they do not know; elsewhere it is wrong."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    has_host_flags = words[:1] in (["train"], ["tune"], ["preflight"], ["describe"])
    parse = partial(
        tyro.cli,
        Arguments,
        prog="ezpz-moe",
        args=arguments,
        config=(CascadeSubcommandArgs, FlagCreatePairsOff, OmitArgPrefixes),
    )
    if not has_host_flags:
        return parse()
    parsed, host_flags = parse(return_unknown_args=True)
    return replace(parsed, command=replace(parsed.command, host_flags=tuple(host_flags)))


if __name__ == "__main__":
    sys.exit(main())
