"""``ezpz-moe completion``."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ezpz_moe.cli import display
from ezpz_moe.cli.command import Command
from ezpz_moe.errors import EzpzError

Shell = Literal["auto", "bash", "zsh", "fish"]


@dataclass(frozen=True)
class Completion(Command):
    """Print a script that completes commands, options and files for your shell, or install it."""

    group = "command line"

    shell: Positional[Shell] = "auto"
    """Complete for this shell; auto is the one that SHELL names."""
    install: bool = False
    """Write the script to your home folder, and the line that loads it to .bashrc or .zshrc."""

    def run(self) -> int:
        from ezpz_moe import cli

        shell = _named_by_environment() if self.shell == "auto" else self.shell
        script = cli.completion_script(shell) + _FILES[shell]
        if not self.install:
            print(script, end="", flush=True)
            return 0
        try:
            for line in _install(shell, script):
                display.print_whole(line)
        except OSError as error:
            raise EzpzError(f"completion: {error.filename}: {error.strerror}.") from error
        display.print_line(f"Open a new {shell} to use it.")
        return 0


COMMAND = Completion

# tyro's scripts offer nothing where the value is a string: most of ours name a file or a flavor.
_FILES = {
    "bash": """
_ezpz_moe() {
  _tyro_ezpz_moe "$@"
  # One empty word means none.
  [[ -n "${COMPREPLY[*]}" ]] || COMPREPLY=()
}
complete -o default -F _ezpz_moe ezpz-moe
""",
    "zsh": """
(( compstate[nmatches] )) || _files
""",
    "fish": """
complete --command ezpz-moe --condition 'test (count (commandline -opc)) -gt 1' --force-files
""",
}


def _named_by_environment() -> str:
    name = Path(os.environ.get("SHELL", "")).name
    if name not in _FILES:
        raise EzpzError(
            f"completion: SHELL is {name!r}. Name your shell: ezpz-moe completion "
            f"{' | '.join(_FILES)}."
        )
    return name


def _install(shell: str, script: str) -> list[str]:
    """Write the script, and the line that loads it; return what was written.

    Raises:
        OSError: one of them cannot be written.
    """
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share", "ezpz_moe", "completion")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    # fish looks here by itself. zsh takes the function's name from the file's.
    file = {
        "bash": data / "ezpz-moe.bash",
        "zsh": data / "_ezpz-moe",
        "fish": config / "fish/completions/ezpz-moe.fish",
    }[shell]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(script)
    written = [f"{file} written"]
    loading = {
        "bash": (home / ".bashrc", f"source {shlex.quote(str(file))}"),
        "zsh": (
            Path(os.environ.get("ZDOTDIR") or home, ".zshrc"),
            f"fpath+=({shlex.quote(str(data))}); autoload -Uz compinit; compinit",
        ),
    }
    if shell in loading and _add(*loading[shell]):
        written.append(f"{loading[shell][0]}: line added: {loading[shell][1]}")
    return written


def _add(settings: Path, line: str) -> bool:
    """Add a line to the end of a shell's settings, unless it is there; return whether it was."""
    said = settings.read_text() if settings.exists() else ""
    if line in said.splitlines():
        return False
    with settings.open("a") as file:
        file.write(f"{'' if said.endswith(chr(10)) or not said else chr(10)}{line}\n")
    return True
