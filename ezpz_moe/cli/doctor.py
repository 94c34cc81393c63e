"""``ezpz-moe doctor``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import refuse_no_ranks
from ezpz_moe.cli.command import Reporting


@dataclass(frozen=True)
class Doctor(Reporting):
    """Check the installation, what the plugin relies on in the host, and a job if one is given.

    Exit code 1 when something is broken.
    """

    group = "before a run"

    config: Annotated[Positional[str | None], arg(metavar="FLAVOR|JOB.toml")] = None
    """The name of a flavor, or the path to a job's TOML."""
    world_size: int | None = None
    """Check the job for this many ranks; without it, skip what depends on them."""

    def run(self) -> int:
        if self.world_size is not None:
            refuse_no_ranks(self.world_size)
        with display.status("Inspecting torch and the host"):
            from ezpz_moe.tools import doctor

            display.set_log_level()  # the host's remarks are about training
            facts = doctor.facts()
            findings = doctor.host_findings()
            can_train = doctor.can_train(findings)
            # The host itself checks a job, so it has to work.
            if self.config is not None and can_train:
                findings += doctor.job_findings(self.config, self.world_size)
        found = [{"state": each.state, **asdict(each)} for each in findings]
        display.print_json({"installed": facts, "findings": found})
        display.print_table(({"installed": what, "": said} for what, said in facts.items()))
        display.print_findings(findings)
        if self.config is not None and not can_train:
            display.print_line(f"{self.config} was not checked: this host cannot start a run.")
        return 0 if all(finding.holds for finding in findings) else 1


COMMAND = Doctor
