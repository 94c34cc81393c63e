"""The model of a run, as far as it says where an expert may be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ezpz_moe.config.flavors import Flavor, load_flavor
from ezpz_moe.config.job import Job, job_for_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.jobs import find_job, load_job
from ezpz_moe.tools.checkpoints.expert_order import why_not_reorder
from ezpz_moe.tools.placement.window import Window

_FLAVOR = "flavor "


def described_by(run: Path, window: Window, config: str | None) -> tuple[Flavor, Job]:
    """Return the flavor and the job of a run.

    Args:
        run: what the user named.
        config: a flavor or a job that the user named too; else the run's records name it.

    Raises:
        EzpzError: there is no such flavor or job, it is not of this model, or its experts have to
            keep their numbers.
    """
    job = find_job(config) if config else _job(run, window)
    flavor = load_flavor(job.flavor, near=job.folder)
    if reasons := why_not_reorder(flavor, job):
        raise EzpzError("\n".join(reasons))
    if flavor.dimensions:
        sizes = flavor.dimensions.layer_sizes
        for layer in window.layers:
            expected = sizes[layer.number].num_experts if layer.number in sizes else "none"
            if expected != layer.experts:
                raise EzpzError(
                    f"{window.source}: layer {layer.number} has {layer.experts} experts, but "
                    f"{expected} in the flavor of {job.source}. Name the run's own flavor or job "
                    "with --config."
                )
    return flavor, job


def _job(run: Path, window: Window) -> Job:
    if run.suffix == ".toml":
        return load_job(run)
    if window.job.startswith(_FLAVOR):
        return job_for_flavor(window.job.removeprefix(_FLAVOR))
    if window.job and Path(window.job).is_file():
        return load_job(window.job)
    named = f"name the job {window.job}, which is not there" if window.job else "name no job"
    raise EzpzError(
        f"{window.source}: its records {named}, and groups of experts have to stay whole. Add "
        "--config FLAVOR|JOB.toml, the run's own."
    )


def expert_groups(flavor: Flavor, layers: Iterable[int]) -> dict[int, int]:
    """Return by layer in how many groups its experts are; 1 where the choice has no limit.

    Args:
        layers: their numbers.

    Raises:
        EzpzError: the installed host cannot say it of a model of its own.
    """
    said = flavor.dimensions or flavor.change
    groups = said.router_num_expert_groups if said else None
    if flavor.dimensions or groups:
        return dict.fromkeys(layers, groups or 1)
    # A model of the host's: only now, for it imports torch.
    from ezpz_moe.hosts.detect import host

    found = host().expert_groups(flavor)
    if found is None:
        raise EzpzError(
            f"{flavor.source}: the installed torchtitan does not say whether experts of "
            f"{flavor.base} are in groups. Install torchtitan 0.3 or later."
        )
    return found
