"""``ezpz-moe convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ezpz_moe import display


@dataclass(frozen=True)
class Convert:
    """Turn a job of torchtitan 0.2 into one that torchtitan 0.3 trains, and report every key.

    Exit code 1 when something that had an effect is lost, 2 when NEW.toml cannot be written.
    """

    old: Annotated[Positional[Path], arg(metavar="OLD.toml")]
    """The job. It is only read."""
    new: Annotated[Positional[Path | None], arg(metavar="NEW.toml")] = None
    """The file to write; it must not exist. Without it there is only the report."""

    def run(self) -> int:
        from ezpz_moe.convert import convert, write
        from ezpz_moe.job import shown

        conversion = convert(self.old, self.new or self.old)
        display.print_table(
            {
                "key": change.key,
                "value": shown(change.new if change.fate == "added" else change.value),
                "becomes": f"{change.fate}: {change.note}" if change.note else change.fate,
            }
            for change in conversion.changes
        )
        if lost := conversion.dropped:
            display.print_line(f"{len(lost)} with an effect dropped: {', '.join(lost)}")
        if self.new is None:
            display.print_line(conversion.refusal)
        else:
            for path in write(conversion, self.new):
                display.print_line(f"{path} written")
        return 1 if lost or conversion.refusal else 0
