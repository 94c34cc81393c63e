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

    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """The run's dump_folder, or its telemetry.jsonl."""
    out: Annotated[Path | None, arg(metavar="DIR")] = None
    """Write the pictures and the page here. Default: RUN_DIR/telemetry."""

    def run(self) -> int:
        from ezpz_moe.telemetry.where import find_records

        find_records(self.run_dir)  # before what draws is imported: a wrong path is told at once
        with display.status("Drawing"):
            # Within the status: importing matplotlib takes a while too.
            from ezpz_moe.telemetry.json_lines import as_json
            from ezpz_moe.telemetry.plot import plot
            from ezpz_moe.telemetry.summary import NOTHING, headline, over_layers_rows

            plotted = plot(self.run_dir, self.out)
        display.print_json(
            {"last": as_json(plotted.last), "alerts": plotted.alerts, "files": plotted.paths}
        )
        display.print_line(headline(plotted.last))
        if rows := over_layers_rows(plotted.last):
            display.print_table(rows)
        else:
            display.print_line(NOTHING)
        for alert in plotted.alerts:
            display.print_line(f"ALERT {alert}")
        for path in plotted.paths:
            display.print_line(f"{path} written")
        return 0


COMMAND = Plot
