"""Rank the cuts of a run, and say what limits each: ``ezpz-moe plan``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.model_sheet import ModelSheet
from ezpz_moe.tools.planning.cuts import (
    LARGEST_MICROBATCH,
    Cut,
    global_batch,
    job_cut,
    legal_cuts,
    matches,
    parsed_choice,
    problems,
    unfilled,
)
from ezpz_moe.tools.planning.load import Loads, loads, rank_imbalance
from ezpz_moe.tools.planning.machine import Machine
from ezpz_moe.tools.planning.memory import Held, fullest
from ezpz_moe.tools.planning.steps import StepTime, step_time


@dataclass(frozen=True)
class Row:
    """A cut and what is predicted of it.

    Attributes:
        cut: the cut.
        held: what its fullest rank holds.
        time: of a step.
        tokens_per_second: of one rank.
    """

    cut: Cut
    held: Held
    time: StepTime
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """The cuts of a run.

    Attributes:
        sheet: the job's.
        on: the machine.
        world_size: ranks of the run.
        ranks_per_node: ranks that share a node.
        load: what the experts' load is assumed to be.
        legal: how many cuts the host accepts.
        rows: those that fit in memory, the fastest first.
        least: bytes of the legal cut that holds least; 0 if there is none.
        own: the job's own cut; None if the host refuses it.
        refused: why it does so; empty if it does not.
    """

    sheet: ModelSheet
    on: Machine
    world_size: int
    ranks_per_node: int
    load: str
    legal: int
    rows: tuple[Row, ...]
    least: int
    own: Row | None
    refused: str = ""

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return global_batch(self.sheet, self.world_size)


def plan(
    config: str,
    host_flags: list[str],
    *,
    world_size: int,
    ranks_per_node: int | None,
    on: Machine,
    load: str,
) -> Plan:
    """Compare all cuts of a job.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        world_size: ranks of the run.
        ranks_per_node: ranks that share a node; None: as many as the machine says.
        on: the machine.
        load: "balanced", "zipf1", or a recorded run.

    Raises:
        EzpzError: the job or the load is wrong, or the ranks do not fill the nodes.
    """
    of_run = loads(load)
    if ranks_per_node is not None and ranks_per_node < 1:
        raise EzpzError(f"--ranks-per-node {ranks_per_node}: must be at least 1.")
    per_node = min(ranks_per_node or on.ranks_per_node, world_size)
    if world_size % per_node:
        raise EzpzError(
            f"--world-size {world_size}: is no multiple of the {per_node} ranks of a node. Fill "
            "the nodes, or say how many ranks of each take part with --ranks-per-node."
        )
    sheet_of = partial(host().planning().model_sheet, config, host_flags, is_cpu=on.device == "cpu")
    sheet = sheet_of()
    others = [sheet_of(backend=each) for each in on.compute.backends if sheet.routed]
    return ranked(sheet, on, world_size, per_node, load, of_run, others)


def ranked(
    sheet: ModelSheet,
    on: Machine,
    world_size: int,
    ranks_per_node: int,
    load: str,
    of_run: Loads | None = None,
    on_backends: Sequence[ModelSheet] = (),
) -> Plan:
    """Return the plan of a sheet, with arguments as in :func:`plan`.

    ``on_backends`` are the sheets of the same job with other backends, which are then a choice.
    """
    imbalances = _Imbalances(sheet, load, of_run)
    legal, least, rows = 0, 0, []
    for each, cut in _choices(sheet, on_backends, world_size, ranks_per_node):
        imbalance = imbalances[each.pads, cut.ep]
        held = fullest(each, cut, imbalance)
        legal, least = legal + 1, min(least or held.total, held.total)
        if held.total <= on.memory.size:
            rows.append(_row(each, cut, held, on, ranks_per_node, imbalance))
    # Of two that take as long, the one that holds less; then in the order of their numbers.
    rows.sort(key=lambda row: (row.time.predicted, row.held.total, str(row.cut)))
    own = job_cut(sheet, world_size)
    refused, of_own = next(_refusals(sheet, own, world_size), ""), imbalances[sheet.pads, own.ep]
    return Plan(
        sheet=sheet,
        on=on,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        load=load,
        legal=legal,
        rows=tuple(rows),
        least=least,
        own=None if refused else predicted(sheet, own, on, ranks_per_node, of_own),
        refused=refused,
    )


def _choices(
    sheet: ModelSheet, on_backends: Sequence[ModelSheet], world_size: int, ranks_per_node: int
) -> Iterator[tuple[ModelSheet, Cut]]:
    """Yield every legal cut with its sheet: the job's own, or one for each backend to choose."""
    for each in on_backends or [sheet]:
        for cut in legal_cuts(each, world_size, ranks_per_node):
            yield each, replace(cut, backend=each.backend) if on_backends else cut


def _refusals(sheet: ModelSheet, own: Cut, world_size: int) -> Iterator[str]:
    """Yield why the host refuses the job's own cut, in words."""
    if own.ranks != world_size:
        yield f"its degrees are those of {own.ranks} ranks"
    yield from problems(sheet, own)
    yield from unfilled(sheet, own)
    sequences, together = global_batch(sheet, world_size), own.microbatch * own.data_ranks
    if sequences % together:
        yield (
            f"{sequences} sequences are no multiple of {own.microbatch} for each of "
            f"{own.data_ranks} ranks"
        )


def predicted(
    sheet: ModelSheet, cut: Cut, on: Machine, ranks_per_node: int, imbalance: float = 1.0
) -> Row:
    """Return what is predicted of one legal cut."""
    held = fullest(sheet, cut, imbalance)
    return _row(sheet, cut, held, on, ranks_per_node, imbalance)


class _Imbalances(dict[tuple[bool, int], float]):
    """Imbalance of a layer, the mean of the layers that differ.

    By whether a backend pads every expert to the busiest one, so that this one alone counts, and by
    the degree of expert parallelism.
    """

    def __init__(self, sheet: ModelSheet, load: str, of_run: Loads | None) -> None:
        self._experts = [routed.num_experts for routed in dict.fromkeys(sheet.routed)]
        self._load, self._of_run = load, of_run

    def __missing__(self, of: tuple[bool, int]) -> float:
        pads, ep = of
        each = [
            rank_imbalance(self._load, self._of_run, E, E if pads else ep) for E in self._experts
        ]
        self[of] = fmean(each) if each else 1.0
        return self[of]


def _row(
    sheet: ModelSheet, cut: Cut, held: Held, on: Machine, ranks_per_node: int, imbalance: float
) -> Row:
    time = step_time(sheet, cut, on, ranks_per_node, imbalance)
    tokens = cut.microbatch * cut.microbatches * cut.data_ranks * sheet.job.seq_len
    return Row(cut, held, time, tokens / cut.ranks / time.predicted)


def best_with(found: Plan, choice: str) -> Row:
    """Return the fastest cut with a choice.

    Raises:
        EzpzError: the host refuses all cuts with it, or none of them fits in memory.
    """
    named = parsed_choice(choice)
    if row := next((row for row in found.rows if matches(row.cut, named)), None):
        return row
    if (backend := named.pop("backend", "")) and backend not in found.on.compute.backends:
        raise EzpzError(
            f"--why {choice!r}: the machine {found.on.name!r} has no figure of this backend: "
            f"{', '.join(found.on.compute.backends) or 'none of any'}. `ezpz-moe plan --calibrate` "
            "measures them; without one, the backend is the job's."
        )
    cuts = legal_cuts(found.sheet, found.world_size, found.ranks_per_node)
    if legal := [cut for cut in cuts if matches(cut, named)]:
        least = min(fullest(found.sheet, cut).total for cut in legal)
        raise EzpzError(
            f"--why {choice!r}: none of the {len(legal)} cuts with it fits: the least is "
            f"{least / 2**30:.1f} GiB, and a rank has {found.on.memory.size / 2**30:.1f} GiB."
        )
    raise EzpzError(
        f"--why {choice!r}: the host accepts no cut with it on {found.world_size} ranks, "
        f"{found.ranks_per_node} in a node, with {found.sequences} sequences in a step"
        f"{_why_not(found, named)}."
    )


def _why_not(found: Plan, named: Mapping[str, str]) -> str:
    """Say what the host has against the fastest cut with these choices in place of its own."""
    numbers = {key: int(value) for key, value in named.items() if key != "ac"}
    for key in ("dp_shard", "dp_replicate", "tp", "pp"):
        if found.world_size % numbers.get(key, 1):
            return f": {key}={numbers[key]} does not divide the {found.world_size} ranks"
    if (size := numbers.get("microbatch", 1)) > LARGEST_MICROBATCH or found.sequences % size:
        return (
            f": microbatch={size} is over {LARGEST_MICROBATCH}, or does not divide the "
            f"{found.sequences} sequences"
        )
    if not found.rows:
        return ""
    own = found.rows[0].cut
    degrees = {key: value for key, value in numbers.items() if key in ("tp", "pp", "ep")}
    reasons = list(problems(found.sheet, Cut(**{**asdict(own), **degrees})))
    return f": {reasons[0]}" if reasons else ""


def as_json(row: Row) -> dict[str, Any]:
    """Return a row as plain values: milliseconds and bytes."""
    time = row.time
    return {
        **asdict(row.cut),
        "parameters": row.held.parameters,
        "state_bytes": row.held.states,
        "activation_bytes": row.held.activations,
        "gathered_bytes": row.held.gathered,
        "step_ms": 1000 * time.predicted,
        "step_ms_if_all_overlaps": 1000 * time.best,
        "step_ms_if_nothing_overlaps": 1000 * time.worst,
        "tokens_per_second_and_rank": row.tokens_per_second,
        "limited_by": time.limited_by,
        "terms_ms": {name: 1000 * seconds for name, seconds in time.terms.items()},
    }
