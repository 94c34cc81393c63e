"""``ezpz-moe plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from ezpz_moe.cli import display
from ezpz_moe.cli.arguments import Config, import_host, placement
from ezpz_moe.cli.inspected import Inspected
from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from ezpz_moe.tools.calibration.rank import Found
    from ezpz_moe.tools.planning.plans import Plan, Row

_EXPLAINED = 5
_IN_JSON = 50
_OF_A_PLAN = ("world_size", "ranks_per_node", "machine", "load", "why", "out")
"""Arguments that a calibration does not have."""


@dataclass(frozen=True, kw_only=True)
class PlanCommand(Inspected):
    """Compare all ways of sharing a model and a batch among ranks, before there is a run.

    Predicts memory and time of every cut that the trainer accepts, from figures of the machine, and
    explains the best five. Starts nothing. All other flags go to the trainer unchanged. Exit code 1
    when no cut fits in memory.
    """

    group = "before a run"

    config: Config
    """The name of a flavor, or the path to a job's TOML. It comes first."""
    ranks_per_node: int | None = None
    """Assume that so many ranks share a node. Default: as many as the machine has."""
    machine: Annotated[str, arg(metavar="NAME|FILE.toml")] = "h100"
    """Assume this machine: h100, a100, pvc, mi300, or a TOML file with your own figures."""
    load: Annotated[str, arg(metavar="balanced|zipf1|RUN")] = "balanced"
    """Assume this load of the experts: even, falling as 1 / n, or as in a run's records."""
    why: Annotated[str | None, arg(metavar="CHOICE")] = None
    """Compare the best cut with a choice, such as tp=2 or 'tp=2 ep=8', with the best of all."""
    out: Annotated[Path | None, arg(metavar="JOB.toml")] = None
    """Write the best cut, with --why that with the choice, as a job. Nothing is overwritten."""

    node_rank: int | None = None
    """As in `train`, for --calibrate."""
    master_addr: str | None = None
    """As in `train`, for --calibrate."""
    master_port: int = 29500
    """As in `train`, for --calibrate."""
    calibrate: Annotated[Path | None, arg(metavar="FILE.toml")] = None
    """Measure this machine for the job, with --nproc processes, and write its file for --machine.
    Nothing is planned then. On several machines run it on each, with the flags of `train`."""

    def run(self) -> int:
        if self.calibrate:
            return self._calibrate(self.calibrate)
        world_size = self.ranks()
        if world_size is None:
            raise EzpzError(
                "plan: how many ranks? Give --world-size, or --nproc and --nnodes as in train."
            )
        from ezpz_moe.hosts.jobs import find_job
        from ezpz_moe.tools.planning.cuts import parsed_choice
        from ezpz_moe.tools.planning.machine import machine

        # Before torch is imported: a mistake is reported at once.
        on = machine(self.machine)
        if self.why is not None:
            parsed_choice(self.why)
        job, flags = find_job(self.config), list(self.host_flags)
        if self.out:
            from ezpz_moe.tools.planning.written import check_target

            check_target(self.out, job, flags)
        with display.status("Comparing cuts"):
            import_host()
            from ezpz_moe.tools.planning.plans import best_with, plan
            from ezpz_moe.tools.planning.written import write_job

            found = plan(
                self.config,
                flags,
                world_size=world_size,
                ranks_per_node=self.ranks_per_node,
                on=on,
                load=self.load,
            )
            other = best_with(found, self.why) if self.why and found.rows else None
        display.print_json(_document(self.config, found, other))
        _print_plan(self.config, found)
        if not found.rows:
            return 1
        if other:
            _print_comparison(str(self.why), found.rows[0], other)
        if self.out:
            write_job(self.out, job, flags, (other or found.rows[0]).cut)
            display.print_line(f"{self.out} written: {(other or found.rows[0]).cut}")
        return 0

    def _calibrate(self, path: Path) -> int:
        """Measure this machine, and write its file."""
        for field in fields(self):
            if field.name in _OF_A_PLAN and getattr(self, field.name) != field.default:
                flag = f"--{field.name.replace('_', '-')}"
                raise EzpzError(
                    f"{flag}: --calibrate measures a machine and plans nothing. Leave it out."
                )
        from ezpz_moe.hosts.jobs import find_job
        from ezpz_moe.tools.calibration.asked import check_asked

        find_job(self.config)
        where = placement(self)
        check_asked(path, self.ranks() or 1)
        with display.status("Measuring"):
            import_host()
            from pydantic import TypeAdapter

            from ezpz_moe.tools.calibration.calibrate import calibrate
            from ezpz_moe.tools.calibration.rank import Found

            found = calibrate(
                self.config, list(self.host_flags), path, nproc=self.nproc or 1, placement=where
            )
        if found is None:
            display.print_line("Measured; node 0 writes the file.")
            return 0
        display.print_json(
            {"machine": str(path), "found": TypeAdapter(Found).dump_python(found, mode="json")}
        )
        _print_found(found)
        display.print_line(f"{path} written: ezpz-moe plan {self.config} --machine {path}")
        return 0


COMMAND = PlanCommand


def _print_found(found: Found) -> None:
    """Print what each rank computes in a second, and what each group of ranks waits for."""
    sizes = {f"product of {flops:.0e} FLOPs": rate for flops, rate in found.products.items()}
    of_experts = {
        f"{name}, {rows:.0f} rows of an expert": rate
        for name, rates in found.experts.items()
        for rows, rate in rates.items()
    }
    rates = {**sizes, "attention": found.attention, **of_experts}
    display.print_table(
        ({"forward and backward": name, "GFLOP/s": f"{r / 1e9:.1f}"} for name, r in rates.items()),
        title=f"{found.device}, each of {found.ranks} ranks at once",
    )
    display.print_table(
        {
            "collective": each.kind,
            "ranks": each.ranks,
            "links": each.tier,
            **{
                f"{size / 2**20:.3g} MiB": _seconds(took)
                for size, took in zip(each.seconds.sizes, each.seconds.values, strict=True)
            },
        }
        for each in found.collectives
    )
    display.print_line(
        f"A copy: {found.bandwidth / 1e9:.1f} GB/s. A rank alone is {found.alone:.2f} times as "
        f"fast. {found.overlap:.0%} of what can hide behind computation does."
    )


def _print_plan(config: str, found: Plan) -> None:
    display.print_line(
        f"{found.on.name}, {_number(found.ranks_per_node, 'rank')} in a node; "
        f"{_number(found.sequences, 'sequence')} of {found.sheet.job.seq_len} tokens in a "
        f"step; load {found.load}."
    )
    if not found.rows:
        least = display.gibibytes(found.least)
        room = display.gibibytes(int(found.on.memory.size))
        display.print_line(
            f"None of the {found.legal} cuts that the trainer accepts fits: the least holds "
            f"{least}, and a rank has {room}."
            if found.legal
            else "The trainer accepts no cut of these ranks and this batch."
        )
        return
    rows = found.rows[:_EXPLAINED]
    display.print_table(
        (_in_words(number, row) for number, row in enumerate(rows, 1)),
        title=f"{config} on {_number(found.world_size, 'rank')}",
        important=["cut", "memory", "step", "limited by"],
    )
    display.print_line(
        f"{len(found.rows)} of {found.legal} cuts that the trainer accepts fit in "
        f'{display.gibibytes(int(found.on.memory.size))}. "Overlapped" is a step whose '
        'collectives all hide behind computation, "serial" one where none does. These are '
        "predictions; docs/guides/plan.md says of what, and of what not."
    )
    if found.own:
        fits = "" if found.own.held.total <= found.on.memory.size else ", which does not fit"
        display.print_line(
            f"The job's own cut: {found.own.cut}: {_seconds(found.own.time.predicted)}, "
            f"{display.gibibytes(found.own.held.total)}{fits}."
        )
    else:
        display.print_line(
            f"The trainer refuses the job's own cut on these ranks: {found.refused}."
        )


def _in_words(number: int, row: Row) -> dict[str, Any]:
    return {
        "": number,
        "cut": str(row.cut),
        "states": display.gibibytes(row.held.states),
        "memory": display.gibibytes(row.held.total),
        "step": _seconds(row.time.predicted),
        "overlapped": _seconds(row.time.best),
        "serial": _seconds(row.time.worst),
        "tokens/s/rank": f"{row.tokens_per_second:.0f}",
        "limited by": _limits(row),
    }


def _limits(row: Row) -> str:
    """Return the largest terms, with their share of the serial time."""
    largest = sorted(row.time.terms.items(), key=lambda term: -term[1])[:2]
    return ", then ".join(f"{name} {seconds / row.time.worst:.0%}" for name, seconds in largest)


def _print_comparison(choice: str, best: Row, other: Row) -> None:
    if other.cut == best.cut:
        display.print_line(f"{choice}: the best cut has it.")
        return
    slower = other.time.predicted / best.time.predicted - 1
    display.print_line(f"\n{choice}: {other.cut}, {slower:.1%} slower than the best:")
    display.print_table(_compared(best, other))


def _compared(best: Row, other: Row) -> Iterator[dict[str, str]]:
    names = dict.fromkeys([*best.time.terms, *other.time.terms])
    sizes = {name: (best.time.terms.get(name, 0), other.time.terms.get(name, 0)) for name in names}
    for name, (ours, theirs) in sorted(
        sizes.items(), key=lambda each: -abs(each[1][1] - each[1][0])
    ):
        if ours or theirs:
            # To what is printed: the same sum in another order differs in its last bits.
            more = round(theirs - ours, 7)
            yield {
                "term": name,
                "best": _seconds(ours),
                "with the choice": _seconds(theirs),
                "difference": _sign(more) + _seconds(abs(more)),
            }
    held = other.held.total - best.held.total
    yield {
        "term": "memory",
        "best": display.gibibytes(best.held.total),
        "with the choice": display.gibibytes(other.held.total),
        "difference": _sign(held) + display.gibibytes(abs(held)),
    }


def _sign(difference: float) -> str:
    return "-" if difference < 0 else "+"


def _seconds(number: float) -> str:
    if number >= 1:
        return f"{number:.2f} s"
    # A step of a small model would be 0.00 ms.
    return f"{number * 1e6:.1f} µs" if 0 < number < 1e-3 else f"{number * 1e3:.2f} ms"


def _number(number: int, of: str) -> str:
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def _document(config: str, found: Plan, other: Row | None) -> dict[str, Any]:
    from ezpz_moe.tools.planning.plans import as_json

    return {
        "config": config,
        "world_size": found.world_size,
        "ranks_per_node": found.ranks_per_node,
        "machine": found.on.name,
        "load": found.load,
        "sequences": found.sequences,
        "legal": found.legal,
        "fitting": len(found.rows),
        "best": [as_json(row) for row in found.rows[:_IN_JSON]],
        "own": as_json(found.own) if found.own else None,
        "with_choice": as_json(other) if other else None,
    }
