"""Whether what `plan` prints as parameters and states is what `preflight` builds, row by row.

    python benchmarks/planned_memory.py
    python benchmarks/planned_memory.py --config qwen3_debugmodel_sdpa --rows 5

Plans a job, and builds the first rank of every pipeline stage of each of the best rows, as
``ezpz-moe preflight`` does. Ends with 1 where a byte differs.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from ezpz_moe.cli import display
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.tools.planning.cuts import Cut
from ezpz_moe.tools.planning.machine import machine
from ezpz_moe.tools.planning.memory import states
from ezpz_moe.tools.planning.plans import plan
from ezpz_moe.tools.preflight import preflight


@dataclass(frozen=True)
class Arguments:
    """Compare the memory of the best cuts with ranks that are built."""

    config: str = "debugmodel_sdpa_for_loop"
    ranks: int = 8
    load: str = "balanced"
    rows: int = 50
    """As many as ``plan --json`` has; its table has five."""


def main(arguments: Arguments) -> None:
    check_host()
    on = machine("h100")
    found = plan(
        arguments.config,
        [],
        world_size=arguments.ranks,
        ranks_per_node=None,
        on=on,
        load=arguments.load,
    )
    differing, seen = 0, set()
    for row in found.rows[: arguments.rows]:
        degrees = _degrees(row.cut)
        # Microbatches and checkpointing change no state.
        if degrees in seen:
            continue
        seen.add(degrees)
        planned = [(each.parameters, each.states) for each in states(found.sheet, row.cut)]
        built = [_held(each) for each in _built(arguments, row.cut, degrees)]
        differing += planned != built
        most = display.gibibytes(max(bytes_ for _, bytes_ in planned))
        said = "the same" if planned == built else f"planned {planned}, built {built}"
        print(f"{row.cut}: {len(planned)} stages, at most {most}: {said}", flush=True)
    print(f"{len(seen)} layouts of {arguments.rows} rows of {arguments.config}; {differing} differ")
    sys.exit(differing > 0)


def _degrees(cut: Cut) -> tuple[str, ...]:
    degrees = {
        "data-parallel-replicate": cut.dp_replicate,
        "tensor-parallel": cut.tp,
        "pipeline-parallel": cut.pp,
        "expert-parallel": cut.ep,
    }
    return tuple(f"--parallelism.{name}-degree={degree}" for name, degree in degrees.items())


def _built(arguments: Arguments, cut: Cut, degrees: tuple[str, ...]) -> list[RankReport]:
    flags = [word for each in degrees for word in each.split("=")]
    return [*preflight(arguments.config, flags, world_size=arguments.ranks, stages=cut.pp)]


def _held(report: RankReport) -> tuple[int | None, int | None]:
    if report.error:
        sys.exit(report.error)
    return report.parameters, report.state_bytes


if __name__ == "__main__":
    main(tyro.cli(Arguments))
