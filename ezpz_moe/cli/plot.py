"""``ezpz-moe plot``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ezpz_moe.cli import display
from ezpz_moe.cli.command import Reporting


@dataclass(frozen=True)
class Plot(Reporting):
    """Draw a run's expert load, its variation, and loss against balance, on one HTML page.

    The run needs a [telemetry] table in its job or flavor, and may still be going on. Replaces the
    pictures of an earlier call.
    """

    group = "after a run"

    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR|JOB.toml")]
    """The run's dump_folder, its telemetry.jsonl, or the job of the run."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Write the pictures and the page here. Default: the folder telemetry beside the records."""

    def run(self) -> int:
        from ezpz_moe.telemetry.where import find_records
        from ezpz_moe.tools.trainer_settings import folder_of_run

        run = folder_of_run(self.run_dir)
        find_records(run)  # before what draws is imported: a wrong path is told at once
        with display.status("Drawing"):
            # Within the status: importing matplotlib takes a while too.
            from ezpz_moe.telemetry.alert_groups import grouped
            from ezpz_moe.telemetry.json_lines import as_json
            from ezpz_moe.telemetry.plot import plot
            from ezpz_moe.telemetry.summary import NOTHING, headline, over_layers_rows

            plotted = plot(run, self.out)
        display.print_json(
            {
                "last": as_json(plotted.last),
                "alerts": list(map(str, plotted.alerts)),
                "files": plotted.paths,
            }
        )
        display.print_line(headline(plotted.last))
        if rows := over_layers_rows(plotted.last):
            display.print_table(rows)
        else:
            display.print_line(NOTHING)
        for group in grouped(plotted.alerts):
            display.print_line(f"ALERT {group.line}")
        for path in plotted.paths:
            display.print_line(f"{path} written")
        return 0


COMMAND = Plot
