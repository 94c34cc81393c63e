"""``ezpz-moe preflight``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config
from ezpz_moe.cli.inspected import Inspected
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.hosts.rank_report import RankReport


@dataclass(frozen=True)
class Preflight(Inspected):
    """Build the ranks of a big run on this machine, without accelerators, and show what each holds.

    Builds one rank per pipeline stage: the first, which has the largest shards. All other flags go
    to the trainer unchanged. Exit code 1 when a rank fails.
    """

    group = "before a run"

    config: Config
    """The name of a flavor, or the path to a job's TOML. It comes first."""

    def run(self) -> int:
        from ezpz_moe.hosts.jobs import find_job
        from ezpz_moe.tools.early_refusals import refuse_sizes
        from ezpz_moe.tools.preflight import preflight
        from ezpz_moe.tools.trainer_settings import pipeline_degree

        world_size = self.ranks()
        if world_size is None:
            raise EzpzError(
                "preflight: how many ranks? Give --world-size, or --nproc and --nnodes as in train."
            )
        flags = list(self.host_flags)
        job = find_job(self.config)
        refuse_sizes(job, flags)
        stages = pipeline_degree(job, flags)
        built = preflight(self.config, flags, world_size=world_size, stages=stages)
        # preflight() yields each report as soon as its rank is built, which moves the bar.
        reports = list(display.tracked(built, "Building ranks", total=stages))
        held = [{"stage": stage, **_document(report)} for stage, report in enumerate(reports)]
        display.print_json({"config": self.config, "world_size": world_size, "ranks": held})
        display.print_table(
            (
                {
                    "stage": stage,
                    "rank": report.rank,
                    "parameters": display.count(report.parameters),
                    "model states": display.gibibytes(report.state_bytes),
                    "step": report.step,
                }
                for stage, report in enumerate(reports)
            ),
            title=f"{self.config} on {world_size} ranks",
        )
        # Ranks mostly fail for the same reason, which is then printed once.
        errors: dict[str, list[int]] = {}
        for report in reports:
            if report.error:
                errors.setdefault(report.error, []).append(report.rank)
        for error, ranks in errors.items():
            display.print_line(f"rank {', '.join(map(str, ranks))}: {error}")
        return 1 if errors else 0


COMMAND = Preflight


def _document(report: RankReport) -> dict[str, Any]:
    """Return a report as plain values."""
    names = ("rank", "parameters", "state_bytes", "step")
    return {name: getattr(report, name) for name in names} | {"error": report.error or None}
