"""``ezpz-moe lint``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ezpz_moe import display
from ezpz_moe.commands.arguments import import_host


@dataclass(frozen=True)
class Lint:
    """Find the trainer's flags in shell, PBS and Slurm scripts that the installed host rejects.

    Exit code 1 when there is one.
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="SCRIPT...")]
    """Scripts that start the trainer. They are only read."""

    def run(self) -> int:
        with display.progress().status("Asking the host for its flags ..."):
            from ezpz_moe.hosts import presumed_generation
            from ezpz_moe.lint import lint, taken_flags

            import_host()
            taken = taken_flags()
            findings = [finding for path in self.files for finding in lint(path, taken)]
        if findings:
            display.print_table(
                {
                    "where": finding.place,
                    "flag": finding.flag,
                    "": "dead" if finding.remedy else "alive",
                    "what to do": finding.remedy or None,
                }
                for finding in findings
            )
        dead = sum(bool(finding.remedy) for finding in findings)
        host = presumed_generation().host
        display.print_line(f"{len(findings)} of the trainer's flags, {dead} dead on {host}")
        return 1 if dead else 0
