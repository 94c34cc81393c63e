"""Every command with its arguments: what ``--help`` prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator

from ezpz_moe import cli

PAGE = "docs/reference/commands.md"
_COLUMNS = 88


def made() -> dict[str, dict[str, str]]:
    """Return the text by document and name."""
    return {PAGE: {"commands": "\n" + "\n".join(_of(()))}}


def _of(command: tuple[str, ...]) -> Iterator[str]:
    """Yield a heading and the help of a command, then those of the commands below it."""
    text = _help(command)
    yield f"## `{' '.join(('ezpz-moe', *command))}`\n\n```text\n{text}\n```\n"
    usage = text.partition("\n\n")[0]
    below = re.search(r"\{([\w,\s-]+)\}\Z", usage)
    for name in below[1].replace("\n", "").split(",") if below else ():
        yield from _of((*command, name.strip()))


def _help(command: tuple[str, ...]) -> str:
    said = io.StringIO()
    os.environ["COLUMNS"] = str(_COLUMNS)
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        cli.main([*command, "--help"])
    return "\n".join(line.rstrip() for line in said.getvalue().strip().splitlines())
