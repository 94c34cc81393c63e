"""``ezpz-moe doctor``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import OptionalConfig, many_imports, only
from ezpz_moe.cli.inspected import Inspected
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.doctor import Finding


@dataclass(frozen=True)
class Doctor(Inspected):
    """Check the installation, what the plugin relies on in the host, and a job if one is given.

    Takes the flags of `train`, its own and the trainer's. Exit code 1 when something is broken.
    """

    group = "before a run"

    config: OptionalConfig = ()
    """The name of a flavor, or the path to a job's TOML. It comes first; without it, only the
    installation is checked."""
    world_size: int | None = None
    """Check the job for this many ranks. Default: --nproc times --nnodes, if one of them is given;
    without ranks, skip what depends on them."""
    resume_from_last_whole: bool = False
    """As in `train`: resume from the newest step that is whole, if a later one is damaged."""
    all: bool = False
    """Also list everything of the host that holds, each backend, and optional packages."""

    def run(self) -> int:
        ranks, config = self.ranks(), only(self.config)
        if config is None and (self.host_flags or ranks is not None):
            raise EzpzError("doctor: the flags of a run need its job: doctor FLAVOR|JOB.toml ...")
        if config is not None:
            from ezpz_moe.hosts.jobs import find_job

            find_job(config)  # before torch is imported: a mistake in its text is told at once
        of_job: list[Finding] = []
        with display.status("Inspecting torch and the host"), many_imports():
            from ezpz_moe.tools import doctor

            display.set_log_level()  # the host's remarks are about training
            facts = doctor.facts(in_full=self.all)
            of_host = doctor.host_findings()
            # The host itself checks a job, so it has to work.
            if config is not None and doctor.can_train(of_host):
                of_job = doctor.job_findings(
                    doctor.Asked(
                        config,
                        ranks=ranks,
                        nproc=self.nproc,
                        host_flags=self.host_flags,
                        from_last_whole=self.resume_from_last_whole,
                    )
                )
        verdict = doctor.verdict(of_host, of_job, config)
        found = [{"state": each.state, **asdict(each)} for each in (*of_host, *of_job)]
        display.print_json({"installed": facts, "findings": found, "verdict": verdict})
        display.print_table({"installed": what, "": said} for what, said in facts.items())
        if self.all:
            display.print_table(
                {"": each.state, "relied on": each.what, "for": each.used_for} for each in of_host
            )
        # What is wrong follows in words.
        fine = [each for each in of_job if not each.problem]
        display.print_table(
            ({"": each.state, "checked": _words(each, config)} for each in fine),
            title=config or "",
        )
        _print_problems([*of_host, *of_job])
        display.print_line(verdict)
        return 0 if all(each.holds for each in (*of_host, *of_job)) else 1


COMMAND = Doctor


def _words(finding: Finding, config: str | None) -> str:
    """Return what was checked of the job, which stands above it."""
    if finding.what == config:
        return finding.used_for
    return f"{finding.what}: {finding.used_for}"


def _print_problems(findings: Iterable[Finding]) -> None:
    """Print a line or two for each problem, the broken ones last, where the reader looks."""
    with_problem = [each for each in findings if each.problem]
    # False sorts first.
    for each in sorted(with_problem, key=lambda each: not each.holds):
        display.print_line(f"{each.state} {each.what}: {each.problem}")
        if each.meaning:
            refused = " A run is refused." if each.vital else ""
            display.print_line(f"  This means: {each.meaning}.{refused}")
