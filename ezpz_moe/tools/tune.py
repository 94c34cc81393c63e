"""Measure ahead of time what ``compute_backend = "auto"`` measures in a job's first step.

Runs one step of the job in the real trainer, on the processes that will train it: rows, sizes,
threads and routing are then the run's own. Each process measures, because any of them may be the
first to be asked in the run. New measurements replace old ones.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from ezpz_moe.compute.cache import CACHE_VARIABLE
from ezpz_moe.compute.names import name_and_options
from ezpz_moe.config.dense_flavors import refuse_dense
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.tools.launch import Tell, train
from ezpz_moe.tools.nodes import Placement

if TYPE_CHECKING:
    from ezpz_moe.compute.tuning import Measured, Situation

_AUTO = "auto"
_NOT_DETERMINISTIC = "--debug.no-deterministic"


def tune(
    config: str,
    host_flags: list[str],
    *,
    tell: Tell,
    nproc: int = 1,
    placement: Placement | None = None,
) -> tuple[int, list[tuple[Situation, Measured]]]:
    """Train one step of ``config``, and save what its ``auto`` measures.

    Args:
        config, host_flags, tell, nproc, placement: as in :func:`ezpz_moe.tools.launch.train`.

    Returns:
        The exit code of the step, and what this machine's processes measured: nothing if the code
        is not 0, or if they got no routed rows.

    Raises:
        EzpzError: as :func:`ezpz_moe.tools.launch.train`; ``auto`` does not compute the job's
        experts, or not by time; or the measurements could not be saved. Nothing has been started
        then.
    """
    job = find_job(config)
    _check_flavor(job)
    _check_timed(job, host_flags)
    from ezpz_moe.compute import agreement, tuning

    _check_folder()
    # In a scratch folder, so nothing is taken from earlier runs, and old times stay if the step
    # fails.
    with tuning.elsewhere() as scratch, tuning.variable(agreement.ALONE_VARIABLE, "1"):
        step = presumed_host().one_step(scratch)
        flags = [*step, *host_flags]
        code = train(config, flags, tell=tell, nproc=nproc, placement=placement)
        # A step that failed may have timed only some of the layers.
        measured = list(tuning.recorded()) if code == 0 else []
    for situation, times in measured:
        tuning.remember(situation, times)
    return code, measured


def _check_flavor(job: Job) -> None:
    flavor = load_flavor(job.flavor, near=job.folder)
    refuse_dense(flavor, "to compute")
    backend = flavor.compute_backend
    if name_and_options(backend)[0] != _AUTO:
        raise EzpzError(
            f"{job.source}: compute_backend = {backend!r} in flavor {flavor.name}, so there is "
            f"nothing to choose. Name a flavor that ends in _{_AUTO}, or set "
            f'compute_backend = "{_AUTO}" in its file.'
        )


def _check_timed(job: Job, host_flags: list[str]) -> None:
    in_file = job.values.get("debug.deterministic") and _NOT_DETERMINISTIC not in host_flags
    if in_file or "--debug.deterministic" in host_flags:
        raise EzpzError(
            f"{job.source}: debug.deterministic = true: {_AUTO} then takes the first usable "
            "backend, whatever was measured, so there is nothing to measure. For runs without it, "
            f"tune with {_NOT_DETERMINISTIC}."
        )


def _check_folder() -> None:
    """Raise if measurements cannot be saved."""
    from ezpz_moe.compute import tuning

    folder = tuning.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Try it now: a read-only folder would otherwise show after a whole step of training.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise EzpzError(
            f"{folder}, where measured times are saved, cannot be written: {error.strerror}. "
            f"Set {CACHE_VARIABLE} to another folder."
        ) from error
