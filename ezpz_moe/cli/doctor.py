"""``ezpz-moe doctor``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import refuse_no_ranks
from ezpz_moe.cli.command import Command


@dataclass(frozen=True)
class Doctor(Command):
    """Check what is installed, what the binding relies on in it, and a job if one is given.

    Exit code 1 when something is broken.
    """

    group = "before a run"

    config: Annotated[Positional[str | None], arg(metavar="FLAVOR|JOB.toml")] = None
    """A flavor's name, or the path of a job's TOML."""
    world_size: int | None = None
    """Ranks of the job; without it, what depends on them is left out."""

    def run(self) -> int:
        if self.world_size is not None:
            refuse_no_ranks(self.world_size)
        with display.progress().status("Looking at torch and the host ..."):
            from ezpz_moe.tools import doctor

            logging.getLogger().setLevel(logging.ERROR)  # what the host remarks is for training
            facts = doctor.facts()
            findings = doctor.host_findings()
            can_train = doctor.can_train(findings)
            if self.config is not None and can_train:
                findings += doctor.job_findings(self.config, self.world_size)
        display.print_table(({"installed": what, "": said} for what, said in facts.items()))
        display.print_findings(findings)
        if self.config is not None and not can_train:
            display.print_line(f"{self.config} was not checked: no run starts with this host.")
        return 0 if all(finding.holds for finding in findings) else 1


COMMAND = Doctor
