"""What each rank of a job holds: weights, gradients, optimizer states, activations, in bytes.

The ranks of one pipeline stage are alike. So one per stage is enough, each in its own process,
as in :mod:`ezpz_moe.tools.preflight`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import COMPONENTS
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.dry_run import STATES_PER_PARAMETER
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.tools.preflight import concurrently, first_ranks, in_a_process

Device = Literal["accelerator", "cpu"]

OPTIMIZER_STATES = STATES_PER_PARAMETER - 2
"""AdamW's per parameter, besides the weight and the gradient."""


@dataclass(frozen=True)
class StageMemory:
    """What a rank of one pipeline stage holds, in bytes by component.

    Attributes:
        rank: the stage's first, which has the largest shards.
        weights: its shards; gradients take the same, AdamW's states twice that.
        activations: what forward leaves for backward, for all microbatches held at a time.
        in_flight: how many microbatches these are.
    """

    rank: int
    weights: Mapping[str, int]
    activations: Mapping[str, int]
    in_flight: int

    @property
    def held(self) -> dict[str, int]:
        """Bytes of everything, by kind."""
        return held(sum(self.weights.values()), sum(self.activations.values()))

    @property
    def held_by_component(self) -> dict[str, dict[str, int]]:
        """Component -> bytes of everything, by kind."""
        shown = [*COMPONENTS, *sorted(self.activations.keys() - set(COMPONENTS))]
        rows = {name: (self.weights.get(name, 0), self.activations.get(name, 0)) for name in shown}
        return {name: held(*row) for name, row in rows.items() if any(row)}


def held(weights: int, activations: int) -> dict[str, int]:
    """Bytes by kind: gradients take as much as weights, AdamW's states twice that."""
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": OPTIMIZER_STATES * weights,
        "activations": activations,
        "total": STATES_PER_PARAMETER * weights + activations,
    }


def stage_memories(
    config: str, host_flags: list[str], *, world_size: int, device: Device
) -> list[StageMemory]:
    """Measure the first rank of every pipeline stage.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        world_size: ranks of the run.
        device: whose kernels compute attention and norms.

    Raises:
        EzpzError: the ranks do not fit the job, one cannot be built, or it is unknown how many
            microbatches the pipeline's schedule holds.
    """
    job = host().memory().pipeline(config, host_flags)
    ranks = first_ranks(world_size, job.stages)
    in_flight = [
        microbatches_in_flight(job.schedule, stage, job.stages, job.microbatches)
        for stage in range(job.stages)
    ]
    # Attention and norms save other tensors on an accelerator than on the CPU.
    look = _activations if device == "accelerator" else _activations_on_cpu
    # One forward through all layers serves every stage; _stage picks out its own part.
    functions = [(look, 0), *((_weights, rank) for rank in ranks)]
    forward, *shards = concurrently(
        partial(in_a_process, function, config, host_flags, world_size, rank)
        for function, rank in functions
    )
    for report in (forward, *shards):
        if report.error:
            raise EzpzError(f"{config}: rank {report.rank} of {world_size}: {report.error}")
    return [_stage(*each, forward) for each in zip(shards, in_flight, strict=True)]


# Functions of this module: a process that is started anew finds what it runs by its name.
def _weights(*arguments: Any) -> RankReport:
    return host().memory().weights(*arguments)


def _activations(*arguments: Any) -> RankReport:
    return host().memory().activations(*arguments)


def _activations_on_cpu(*arguments: Any) -> RankReport:
    return host().memory().activations_on_cpu(*arguments)


def microbatches_in_flight(schedule: str, stage: int, stages: int, microbatches: int) -> int:
    """Return the most microbatches whose activations a stage holds at a time.

    One without a pipeline. GPipe (arXiv 1811.06965) runs all forwards first; in 1F1B
    (PipeDream-Flush, arXiv 2006.09503) a stage is ahead of the last one by their distance.

    Raises:
        EzpzError: the schedule is another one.
    """
    if stages == 1:
        return 1
    match schedule.lower():
        case "gpipe":
            return microbatches
        case "1f1b":
            # The last stage goes back at once and holds one; every stage before it waits for one
            # more.
            return min(stages - stage, microbatches)
    raise EzpzError(
        f"parallelism.pipeline_parallel_schedule = {schedule!r}: only for 1F1B and GPipe is it "
        "known how many microbatches a rank holds. `ezpz-moe preflight` measures the model states "
        "of every schedule."
    )


def _stage(shards: RankReport, in_flight: int, forward: RankReport) -> StageMemory:
    """Select the stage's own activations from those of all layers."""
    # A stage's own parts are those of which its rank holds weights.
    parts = {part for part, _ in shards.bytes_by_place}
    activations: Counter[str] = Counter()
    for (part, component), number in forward.bytes_by_place.items():
        if part in parts:
            # The loss is computed, and its memory freed, one microbatch after the other.
            activations[component] += number * (1 if part == "lm_head" else in_flight)
    weights: Counter[str] = Counter()
    for (_, component), number in shards.bytes_by_place.items():
        weights[component] += number
    return StageMemory(shards.rank, weights, activations, in_flight)
