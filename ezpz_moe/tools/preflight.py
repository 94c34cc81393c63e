"""Build the ranks of a big run one by one on this machine: ``ezpz-moe preflight``.

The ranks of one pipeline stage differ only in their number, and the first has the largest shards.
So one rank per stage is built, each in its own process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial

from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.rank_report import RankReport

_PROCESSES = 2  # each imports torch and the host: about 1 GiB

Look = Callable[[str, list[str], int, int], RankReport]
"""What a process runs, with the arguments of ``Host.run_rank``."""


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
        EzpzError: the stages cannot share the ranks equally, or a process died.
    """
    jobs = (
        partial(in_a_process, _run_rank, config, host_flags, world_size, rank)
        for rank in first_ranks(world_size, stages)
    )
    yield from concurrently(jobs)


def _run_rank(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    return host().run_rank(config, host_flags, world_size, rank)


def first_ranks(world_size: int, stages: int) -> range:
    """Return the first rank of every pipeline stage.

    Raises:
        EzpzError: the stages cannot share the ranks equally.
    """
    if world_size % stages:
        raise EzpzError(
            f"--world-size {world_size}: must be a multiple of "
            f"parallelism.pipeline_parallel_degree = {stages}."
        )
    return range(0, world_size, world_size // stages)  # pipelines are the outermost dimension


def concurrently(jobs: Iterable[Callable[[], RankReport]]) -> Iterator[RankReport]:
    """Run the jobs, as many at a time as memory is likely to hold; yield reports in order."""
    # Threads only wait for their processes, and map() keeps the order.
    with ThreadPoolExecutor(_PROCESSES) as threads:
        yield from threads.map(lambda job: job(), jobs)


def in_a_process(
    function: Look, config: str, host_flags: list[str], world_size: int, rank: int
) -> RankReport:
    """Run ``function`` in a process, which imports it from its module, and return its report.

    Each rank has its own pool: a shared one would not tell which rank's process died.

    Raises:
        EzpzError: the process died.
    """
    # Spawned, not forked: the host keeps global state that a fork would inherit.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_run, function, config, host_flags, world_size, rank).result()
        except BrokenProcessPool:
            raise EzpzError(
                f"rank {rank} of {world_size}: the process that built it died. Usually the system "
                f"killed it because memory ran out: {_PROCESSES} run at a time, each with 1 GiB or "
                "more. Run this where more memory is free, such as in an interactive job."
            ) from None


def _run(
    function: Look, config: str, host_flags: list[str], world_size: int, rank: int
) -> RankReport:
    """Run in the new process. Whatever goes wrong becomes the report."""
    os.environ[DEBUG_VARIABLE] = "1"  # mistakes are raised, not printed
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    check_host()
    try:
        return function(config, host_flags, world_size, rank)
    except EzpzError as error:
        return RankReport(rank, error=str(error))
    except Exception as error:
        return RankReport(rank, error=f"{type(error).__name__}: {error}")
