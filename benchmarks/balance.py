"""Train one model with different balancing, and compare loss and load.

    python benchmarks/balance.py
    python benchmarks/balance.py --steps 40 --only none bias --out /tmp/balance

The debug model learns the embedded text from the same seed with each of ``FLAVORS``, with
``ezpz-moe train``, and the table is made from the runs' telemetry.jsonl: means over the last tenth
of the steps, and for the load over layers. docs/reference/routing.md has it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro
from debug_runs import train

from ezpz_moe.cli import display
from ezpz_moe.telemetry.figures import coefficient_of_variation, dead_experts
from ezpz_moe.telemetry.json_lines import FILE_NAME, read
from ezpz_moe.telemetry.record import StepRecord

FLAVORS = {
    "none": '[balance]\nbias_update = "none"',
    "bias": '[balance]\nbias_update = "sign"\nbias_rate = 0.001',
    "aux_loss 0.01": '[balance]\nbias_update = "none"\naux_loss = 0.01',
    "aux_loss 0.001": '[balance]\nbias_update = "none"\naux_loss = 0.001',
    "z_loss": '[balance]\nbias_update = "none"\nz_loss = 0.001',
    "sinkhorn": '[router]\nrouting = "sinkhorn"\n[balance]\nbias_update = "none"',
}


@dataclass(frozen=True)
class Arguments:
    """Train the debug model with different balancing, and compare loss and load."""

    steps: int = 200
    only: tuple[str, ...] = tuple(FLAVORS)
    """Of the flavors."""
    out: Path = Path("outputs/balance")
    """Where the runs are kept; one with as many steps that is there already is not repeated."""


def records_of(name: str, folder: Path, steps: int) -> list[StepRecord]:
    """The telemetry of a run of ``steps`` steps, from the folder if it is there."""
    flavor = f'inherits = "debugmodel"\n{FLAVORS[name]}\n[telemetry]\nimages = false\n'
    train({"balanced": flavor}, folder, steps, suffix="_sdpa_for_loop")
    return read(folder / FILE_NAME)


def row(name: str, records: list[StepRecord]) -> dict[str, str]:
    last = records[-max(1, len(records) // 10) :]
    layers = [layer for record in last for layer in record.layers]
    cvs = [coefficient_of_variation(layer.counts_E) for layer in layers]

    def mean(values: list[float], digits: int) -> str:
        return f"{statistics.fmean(values):.{digits}f}"

    return {
        "balance": name,
        "loss": mean([record.loss or float("nan") for record in last], 3),
        "load CV": mean(cvs, 3),
        "worst layer's CV": f"{max(cvs):.3f}",
        "dead experts": mean([len(dead_experts(layer.counts_E)) for layer in layers], 2),
        "aux loss": mean([layer.losses["aux_loss"] for layer in layers], 4),
        "z-loss": mean([layer.losses["z_loss"] for layer in layers], 2),
        "top-1 probability": mean([layer.top1_probability for layer in layers], 3),
    }


def main(arguments: Arguments) -> None:
    rows = [
        row(name, records_of(name, arguments.out / name.replace(" ", "_"), arguments.steps))
        for name in arguments.only
    ]
    display.print_table(rows, title=f"debugmodel, {arguments.steps} steps")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
