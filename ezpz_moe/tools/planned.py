"""What `ezpz-moe train` would start: ``ezpz-moe train --dry-run``. Nothing is started."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import flavor_of
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import backend_of
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.parts import TrainerConfig
from ezpz_moe.hosts.ranks import degrees, outside_of_a_run
from ezpz_moe.hosts.setting import Setting
from ezpz_moe.telemetry.text import count
from ezpz_moe.tools import device
from ezpz_moe.tools.launch import Start
from ezpz_moe.tools.nodes import Placement
from ezpz_moe.tools.resuming import resumption


@dataclass(frozen=True)
class Planned:
    """A run that would be started.

    Attributes:
        what: in words, by a name for each.
        settings: those of the trainer that differ from its own defaults.
        remarks: what the run does that nobody may have meant.
        fits: whether the device holds a rank's model states.
        command: what would be run, as for a shell.
    """

    what: dict[str, str]
    settings: list[Setting]
    remarks: list[str]
    fits: bool
    command: str


def planned(
    start: Start,
    host_flags: list[str],
    *,
    nproc: int,
    placement: Placement | None,
    from_last_whole: bool,
) -> Planned:
    """Check a run as its ranks would, and say what it is.

    Args:
        start: what the launcher has checked.
        host_flags: the trainer's own flags, which override the job.
        nproc: processes on this machine.
        placement: this machine's place among several; None if it is the only one.
        from_last_whole: whether to resume from an earlier step if the newest is damaged.

    Raises:
        EzpzError: the run would be refused, for all these reasons.
    """
    check_host()
    ranks = nproc * (placement.nnodes if placement else 1)
    # RANK and WORLD_SIZE of a surrounding job script are not those of this run.
    with outside_of_a_run():
        trainer_config = host().trainer_config(start.job, host_flags)
        flavor = flavor_of(start.job)
        problems = host().machine_problems(trainer_config, flavor, ranks)
    source = f"{start.job.source} and the command line" if host_flags else start.job.source
    if problems:
        raise EzpzError(
            "\n  ".join([f"{source}:", *problems]) if problems[1:] else f"{source}: {problems[0]}"
        )
    resumed = resumption(start.job, trainer_config, host_flags, from_last_whole=from_last_whole)
    summary = host().summarize(flavor)
    states = device.model_states(trainer_config, summary.total, ranks, nproc)
    active = count(summary.active)
    return Planned(
        what={
            "job": source,
            "model": f"{flavor.name}: {count(summary.total)} parameters, {active} of them active",
            "experts": _experts(flavor),
            "device": device.in_words(),
            "precision": host().precision_in_words(trainer_config, flavor),
            "ranks": _ranks(trainer_config, nproc, placement),
            "memory": f"{states.needed}; {states.room}",
            "steps": f"{resumed.step if resumed else 1} to {trainer_config.training.steps}",
            "checkpoints": _checkpoints(start, trainer_config),
            "begins with": str(resumed.checkpoint) if resumed else "initial values",
            "writes to": start.settings.dump_folder,
        },
        settings=[each for each in host().settings(trainer_config) if each.changed],
        remarks=host().remarks(trainer_config),
        fits=states.fit,
        command=shlex.join(["torchrun", *start.arguments]),
    )


def _experts(flavor: Flavor) -> str:
    return f"{flavor.compute_backend} ({backend_of(flavor).summary})"


def _ranks(config: TrainerConfig, nproc: int, placement: Placement | None) -> str:
    """Return who computes, and how the ranks divide the work."""
    if placement is None:
        who = f"{nproc} on this machine"
    else:
        who = (
            f"{nproc * placement.nnodes}, {nproc} on each of {placement.nnodes} machines, of which "
            f"this is number {placement.node_rank}"
        )
    ranks = nproc * (placement.nnodes if placement else 1)
    shared = [f"{name} {degree}" for name, degree in degrees(config.parallelism, ranks).items()]
    return f"{who}: {', '.join(shared)}" if shared else who


def _checkpoints(start: Start, config: TrainerConfig) -> str:
    if not start.settings.is_enabled:
        return "off"
    if not start.settings.is_saving:
        return f"none are saved; loaded from {start.settings.folder}"
    return f"every {config.checkpoint.interval} steps to {start.settings.folder}"
