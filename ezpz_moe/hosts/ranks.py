"""Check how the ranks of a run divide the model and the batch. The same for all hosts.

``config`` is the host's, and ``parallelism`` its section of that name. The degrees that lay out the
ranks have the same names in every generation. Each check yields the messages of its problems.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.distributed.pipelining.schedules import Schedule1F1B, get_schedule_class


@dataclass(frozen=True)
class Batch:
    """What is computed between two optimizer steps, as settings: each a path and a value.

    Attributes:
        step: size for all ranks together; zero or negative means as little as possible.
        microbatch: size that one rank computes at once, in the same unit.
        microbatches: the least number of those that a rank computes.
    """

    step: tuple[str, int]
    microbatch: tuple[str, int]
    microbatches: int = 1


def is_dry_run(config: Any) -> bool:
    """Return whether this process only pretends to be one of many ranks.

    If so, the files and devices of the real ranks are not here.
    """
    return config.comm.mode in ("fake_backend", "local_tensor")


def started_rank_problems(
    config: Any, batch: Batch, *, expert_tensor_parallel: int = 1
) -> Iterator[str]:
    """Yield :func:`rank_problems` for the number of ranks in the environment, if it is set."""
    # Both variables are the host's. It reports by itself if a dry run lacks NGPU.
    ranks = os.environ.get("NGPU" if is_dry_run(config) else "WORLD_SIZE")
    # Not set: no rank of a run, so there is nothing to compare with.
    if not ranks:
        return iter(())
    return rank_problems(
        config.parallelism, int(ranks), batch, expert_tensor_parallel=expert_tensor_parallel
    )


@contextlib.contextmanager
def outside_of_a_run() -> Iterator[None]:
    """Hide the rank that a job script may have set: checks for a run are made only in its ranks."""
    rank = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(rank)


def share_of_model(parallelism: Any, ranks: int) -> float:
    """Return the share of the parameters that a rank holds on average.

    All degrees shard them except data_parallel_replicate. What tensor parallelism leaves whole
    (norms, routers) is small and not counted. The stages of a pipeline count as equal.
    """
    return parallelism.data_parallel_replicate_degree / ranks


def degrees(parallelism: Any, ranks: int) -> dict[str, int]:
    """Return the degrees above 1 by name; a shard degree of -1 gets the ranks that are left."""
    found = {
        name.removesuffix("_degree"): getattr(parallelism, name)
        for name in (
            "pipeline_parallel_degree",
            "data_parallel_replicate_degree",
            "data_parallel_shard_degree",
            "context_parallel_degree",
            "tensor_parallel_degree",
        )
    }
    if found["data_parallel_shard"] == -1:
        # The product of the others is negative here, as it contains the -1.
        found["data_parallel_shard"] = ranks // -math.prod(found.values())
    found["expert_parallel"] = parallelism.expert_parallel_degree
    return {name: degree for name, degree in found.items() if degree > 1}


def fewest_ranks(parallelism: Any) -> int:
    """Return the fewest ranks that the degrees allow; a shard degree of -1 gets the least."""
    par = parallelism
    inner = par.context_parallel_degree * par.tensor_parallel_degree
    shard = par.data_parallel_shard_degree
    if shard == -1:
        experts = par.expert_parallel_degree
        # Expert parallelism takes its ranks from shard x inner, so that product has to be a
        # multiple of the degree: inner provides gcd(experts, inner) of it, sharding the rest.
        shard = experts // math.gcd(experts, inner)
    outer = par.pipeline_parallel_degree * par.data_parallel_replicate_degree
    return outer * shard * inner


def rank_problems(
    parallelism: Any, ranks: int, batch: Batch, *, expert_tensor_parallel: int = 1
) -> Iterator[str]:
    """Check the ranks against the degrees, the experts' layout and the batch.

    Args:
        parallelism: the degrees.
        ranks: number of ranks in the run.
        batch: what a step computes.
        expert_tensor_parallel: ranks that share an expert, if the host has such a degree.
    """
    par, within = parallelism, expert_tensor_parallel
    outer = par.pipeline_parallel_degree * par.data_parallel_replicate_degree
    inner = par.context_parallel_degree * par.tensor_parallel_degree
    shard = par.data_parallel_shard_degree
    if shard == -1:
        # Rounded down: if something is left over, the next check sees it.
        shard = ranks // (outer * inner)
    if outer * shard * inner != ranks:
        yield (
            f"{ranks} ranks do not fit the degrees: pipeline_parallel "
            f"{par.pipeline_parallel_degree} x data_parallel_replicate "
            f"{par.data_parallel_replicate_degree} x data_parallel_shard "
            f"{par.data_parallel_shard_degree} x context_parallel {par.context_parallel_degree} x "
            f"tensor_parallel {par.tensor_parallel_degree} must be {ranks} (-1: what is left)."
        )
        # The checks below make sense only for degrees that fit.
        return
    # Replicas are not in it: each has all experts.
    if shard * inner % (par.expert_parallel_degree * within):
        yield (
            f"parallelism.expert_parallel_degree = {par.expert_parallel_degree}"
            f"{f' x expert_tensor_parallel {within}' if within > 1 else ''} does not divide "
            f"the {shard * inner} ranks that share the experts (data_parallel_shard x "
            f"context_parallel x tensor_parallel)."
        )
    yield from _batch_problems(batch, shard * par.data_parallel_replicate_degree)


def _batch_problems(batch: Batch, data_ranks: int) -> Iterator[str]:
    (step_path, step), (path, size) = batch.step, batch.microbatch
    least = size * batch.microbatches * data_ranks
    # Otherwise the step is one microbatch of every rank, which always fits.
    if step > 0 and step % least:
        yield (
            f"{step_path} = {step} is not a multiple of {least}, which is {path} = {size} x the "
            f"data-parallel ranks"
            f"{' x the microbatches of the pipeline' if batch.microbatches > 1 else ''}."
        )


def head_problems(parallelism: Any, heads: Iterable[int], flavor: str) -> Iterator[str]:
    """Check each number of attention heads in the model, those of queries and those of keys."""
    degree = parallelism.tensor_parallel_degree
    # Layers mostly have the same numbers, and one message about them is enough.
    for number in dict.fromkeys(heads):
        if number % degree:
            yield (
                f"parallelism.tensor_parallel_degree = {degree} does not divide the {number} "
                f"attention heads of flavor {flavor!r}."
            )


def schedule_problems(config: Any) -> Iterator[str]:
    """Check that torch knows the pipeline's schedule, and that the batch has its microbatches."""
    parallelism = config.parallelism
    try:
        # torch's own lookup: its error lists the names, and it ignores case like the run.
        schedule = get_schedule_class(parallelism.pipeline_parallel_schedule)
    except ValueError as error:
        yield f"parallelism.pipeline_parallel_schedule: {error}"
        return
    degree, size = (
        parallelism.pipeline_parallel_degree,
        parallelism.pipeline_parallel_microbatch_size,
    )
    # Newer hosts count a batch in tokens.
    local = getattr(config.training, "local_batch_size", None)
    if degree == 1 or local is None:
        return
    said = (
        f"training.local_batch_size = {local} and parallelism.pipeline_parallel_microbatch_size = "
        f"{size}"
    )
    if local % size:
        yield f"{said}: the one must be a multiple of the other."
    # Only this schedule needs one for every stage, of which each rank has one.
    elif schedule is Schedule1F1B and local // size < degree:
        yield (
            f"{said} make {local // size} microbatches, but schedule 1F1B needs one for each of "
            f"the parallelism.pipeline_parallel_degree = {degree} stages."
        )
