"""``ezpz-moe new``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.command import Command
from ezpz_moe.config.devices import Device


@dataclass(frozen=True)
class New(Command):
    """Write a commented job to begin with. Nothing is overwritten."""

    group = "before a run"

    job: Annotated[Positional[Path], arg(metavar="JOB.toml")]
    """The file to write."""
    flavor: str = "debugmodel"
    """Train this model; `ezpz-moe flavors` lists them. It may name attention and backend."""
    device: Device = "any"
    """Choose attention and backend for this device, as far as --flavor does not."""
    data: str | None = None
    """Train on this file, of text or chats, or on this one of torchtitan's datasets. Default: the
    embedded text."""

    def run(self) -> int:
        from ezpz_moe.tools.new_job import new_job

        made = new_job(self.job, self.flavor, self.device, self.data)
        display.print_line(f"{made.path} written: {made.flavor}. Next:")
        path = shlex.quote(str(made.path))
        for command in ("doctor", "train"):
            display.print_whole(f"  ezpz-moe {command} {path}{made.several}")
        return 0


COMMAND = New
