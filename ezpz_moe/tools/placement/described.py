"""The model of a run, as far as it says where an expert may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ezpz_moe.config.flavors import Flavor, load_flavor
from ezpz_moe.config.job import Job, job_for_flavor
from ezpz_moe.errors import EzpzError, some
from ezpz_moe.hosts.jobs import find_job, load_job
from ezpz_moe.tools.checkpoints.expert_order import why_not_reorder
from ezpz_moe.tools.placement.window import Window

_FLAVOR = "flavor "


def described_by(run: Path, window: Window, config: str | None) -> Flavor:
    """Return the flavor of a run.

    Args:
        run: what the user named.
        config: a flavor or a job that the user named too; else the run's records name it.

    Raises:
        EzpzError: there is no such flavor or job, it is not of this model, or its experts have to
            keep their numbers.
    """
    job = find_job(config) if config else _job(run, window)
    flavor = _flavor(job)
    if reasons := why_not_reorder(flavor, job):
        raise EzpzError("\n".join(reasons))
    if flavor.dimensions:
        _check_experts(
            window,
            flavor,
            {number: size.num_experts for number, size in flavor.dimensions.layer_sizes.items()},
        )
    if config:
        _check_same_model(flavor, config, run, window)
    return flavor


def _flavor(job: Job) -> Flavor:
    return load_flavor(job.flavor, near=job.folder)


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


def _check_experts(window: Window, flavor: Flavor, experts: Mapping[int, int]) -> None:
    for layer in window.layers:
        expected = experts.get(layer.number, "none")
        if expected != layer.experts:
            raise EzpzError(
                f"{window.source}: layer {layer.number} has {layer.experts} experts, but "
                f"{expected} in flavor {flavor.name}. Name the run's own flavor or job with "
                "--config."
            )


def _check_same_model(flavor: Flavor, config: str, run: Path, window: Window) -> None:
    try:
        own = _job(run, window)
        differences = list(_differences(_flavor(own), flavor))
    except EzpzError:  # it is gone, or wrong by now: this is why the user names another
        return
    if differences:
        raise EzpzError(
            f"--config {config}: is another model than the run's, {own.source}: "
            f"{some(differences)}. Leave it out, or name the run's own."
        )


def _differences(own: Flavor, other: Flavor) -> Iterator[str]:
    """Yield in which sizes two flavors differ, in words; how far positions reach is none."""
    ours, theirs = _sizes(own), _sizes(other)
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            yield f"{key} is {ours.get(key)!r} there and {theirs.get(key)!r} here"


def _sizes(flavor: Flavor) -> dict[str, Any]:
    said: dict[str, Any] = {"base": flavor.base}
    for table in (flavor.dimensions, flavor.change):
        if table is not None:
            said |= table.model_dump(exclude={"rope", "mscale"})
    return said


def expert_groups(flavor: Flavor, window: Window) -> dict[int, int]:
    """Return by layer in how many groups its experts are; 1 where the choice has no limit.

    Raises:
        EzpzError: the installed host cannot say it of a model of its own, or that has other
            experts than the run.
    """
    if flavor.dimensions:
        groups = flavor.dimensions.router_num_expert_groups or 1
        return {layer.number: groups for layer in window.layers}
    # A model of the host's: only now, for it imports torch.
    from ezpz_moe.hosts.detect import host

    found = host().grouped_experts(flavor)
    if found is None:
        raise EzpzError(
            f"{flavor.source}: the installed torchtitan does not say whether experts of "
            f"{flavor.base} are in groups. Install torchtitan 0.3 or later."
        )
    _check_experts(window, flavor, {number: experts for number, (experts, _) in found.items()})
    return {number: groups for number, (_, groups) in found.items()}
