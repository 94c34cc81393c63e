"""``ezpz-moe tune``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config, print_emulated
from ezpz_moe.cli.train import Launched

if TYPE_CHECKING:
    from ezpz_moe.compute.tuning import Measured, Situation


@dataclass(frozen=True)
class Tune(Launched):
    """Time the backends that compute_backend = "auto" chooses from, during one step of a job.

    The job's later runs then know the fastest from the start. All other flags go to the trainer
    unchanged.
    """

    config: Config
    """The name of a flavor, or the path to a job's TOML. It comes first."""

    def run(self) -> int:
        from ezpz_moe.tools.tune import tune

        with display.stdout_of_others():  # the trainer logs there
            code, measured = tune(self.config, list(self.host_flags), **self._launch())
        # The trainer has already said why.
        if code:
            return code
        from ezpz_moe.compute.tuning import cache_folder

        found = [_document(*each) for each in measured]
        display.print_json({"config": self.config, "measured": found, "saved_in": cache_folder()})
        if not measured:
            display.print_line("Nothing was measured: no routed rows reached these processes.")
            return 0
        from ezpz_moe.tools.verify import default_device

        display.print_table(
            map(_row, *zip(*measured, strict=True)),
            title=f"auto in {self.config}",
            important=["fastest", "forward and backward"],
        )
        print_emulated(default_device(), (each.question.dtype for each, _ in measured))
        display.print_line(f"Saved in {cache_folder()}")
        return 0


COMMAND = Tune


def _document(situation: Situation, measured: Measured) -> dict[str, Any]:
    return {
        **asdict(situation.question),
        "rows_up_to": situation.rows,
        "busiest_over_mean": float(situation.busiest),
        "fastest": measured.fastest,
        "milliseconds": measured.milliseconds,
    }


def _row(situation: Situation, measured: Measured) -> dict[str, str]:
    question = situation.question
    E, inner, outer = question.sizes
    return {
        "product": f"{question.product}, {E} x {inner} x {outer}, {question.dtype}",
        "rows up to": str(situation.rows),
        "busiest / mean": situation.busiest,
        "fastest": measured.fastest,
        "forward and backward": str(measured),
    }
