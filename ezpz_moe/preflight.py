"""The ranks of a big run, built one by one on this machine: ``ezpz-moe preflight``.

Ranks of one pipeline stage differ only in who they are, and the first of them has the largest
shards; so one rank per stage is built, each in a process of its own.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError
from ezpz_moe.hosts import binding, check_host

_PROCESSES = 2  # each imports torch and the host: about 1 GiB


@dataclass(frozen=True)
class RankReport:
    """What one rank would hold.

    Attributes:
        rank: global rank.
        parameters: number of parameters in its shards; None, as the next two, after an error.
        state_bytes: weights, gradients and optimizer states in bytes; activations are not in it.
        step: what of a step was run with tensors that have no values, or why none was.
        error: what the rank met; empty when it was built.
    """

    rank: int
    parameters: int | None = None
    state_bytes: int | None = None
    step: str | None = None
    error: str = ""


def preflight(
    config: str, host_flags: list[str], *, world_size: int, stages: int
) -> Iterator[RankReport]:
    """Build the first rank of every pipeline stage, in order.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        world_size: ranks of the run.
        stages: the pipeline's degree.

    Raises:
        EzpzError: the ranks cannot be shared out among the stages, or a process died.
    """
    if world_size % stages:
        raise EzpzError(
            f"--world-size {world_size}: has to be a multiple of "
            f"parallelism.pipeline_parallel_degree = {stages}."
        )
    ranks = range(0, world_size, world_size // stages)  # pipelines are the outermost dimension
    build = partial(_in_a_process, config, host_flags, world_size)
    with ThreadPoolExecutor(_PROCESSES) as threads:
        yield from threads.map(build, ranks)


def _in_a_process(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """A pool of its own for each rank: one for all would not tell whose process died."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run_rank, config, host_flags, world_size, rank).result()
        except BrokenProcessPool:
            raise EzpzError(
                f"rank {rank} of {world_size}: the process that built it died. Most often the "
                f"system killed it for its memory: {_PROCESSES} run at a time, each of 1 GiB and "
                "more. Start preflight where more memory is free, such as in an interactive job."
            ) from None


def _run_rank(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """What a process is for. Everything that goes wrong there is the report."""
    os.environ[DEBUG_VARIABLE] = "1"  # mistakes are raised, not printed
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    check_host()
    try:
        return binding("preflight").run_rank(config, host_flags, world_size, rank)
    except EzpzError as error:
        return RankReport(rank, error=str(error))
    except Exception as error:
        return RankReport(rank, error=f"{type(error).__name__}: {error}")
