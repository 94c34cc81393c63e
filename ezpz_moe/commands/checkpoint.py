"""``ezpz-moe ckpt``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from ezpz_moe import display


@dataclass(frozen=True)
class Inspect:
    """Tell what a checkpoint holds and which generation of torchtitan wrote it."""

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint's folder, such as outputs/checkpoint/step-100."""

    def run(self) -> int:
        with display.progress().status("Reading ..."):
            from ezpz_moe.checkpoints import inspect

            contents = inspect(self.folder)
        shown = {
            **asdict(contents),
            "parameters": display.count(contents.parameters),
            "dtypes": ", ".join(contents.dtypes),
            "bytes": display.gibibytes(contents.bytes),
        }
        display.print_line(str(self.folder))
        display.print_table({"checkpoint": what, "": value} for what, value in shown.items())
        return 0


@dataclass(frozen=True)
class Remap:
    """Write a checkpoint under the names of another generation of torchtitan, bit for bit."""

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """A checkpoint's folder."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """The folder to write; it must not exist."""
    to: Literal["0.2", "0.3", "main"]
    """The generation whose names it gets: 0.3 until August 2026, main from September 2026 on."""

    def run(self) -> int:
        from ezpz_moe.checkpoints import remap

        copied = partial(display.tracked, what="Writing and comparing")
        done = remap(self.source, self.target, self.to, progress=copied)
        display.print_line(
            f"{self.target}: {done.changed} names changed, all {done.entries} entries compared"
        )
        for note in done.notes:
            display.print_line(note)
        return 0


@dataclass(frozen=True)
class Checkpoint:
    """Look at a checkpoint, or carry it to another generation of torchtitan."""

    action: Annotated[Inspect, subcommand("inspect")] | Annotated[Remap, subcommand("remap")]

    def run(self) -> int:
        return self.action.run()
