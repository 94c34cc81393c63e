"""What `ezpz-moe train` would start: ``ezpz-moe train --dry-run``. Nothing is started."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import flavor_of
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import backend_of
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.parts import TrainerConfig
from ezpz_moe.hosts.ranks import degrees, outside_of_a_run
from ezpz_moe.hosts.setting import Setting
from ezpz_moe.telemetry.text import count
from ezpz_moe.tools import device
from ezpz_moe.tools.launch import Start
from ezpz_moe.tools.nodes import Placement
from ezpz_moe.tools.resuming import Resumption, resumption


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
    _refuse(source, problems)
    resumed = resumption(start.job, trainer_config, host_flags, from_last_whole=from_last_whole)
    _refuse_model_alone(resumed)
    summary = host().summarize(flavor)
    states = device.model_states(trainer_config, summary.total, ranks, nproc)
    return Planned(
        what={
            "job": source,
            **_model(flavor, trainer_config, summary),
            "ranks": _ranks(trainer_config, nproc, placement),
            "memory": f"{states.needed}; {states.room}",
            "steps": _steps(resumed, trainer_config.training.steps),
            "checkpoints": _checkpoints(start, trainer_config),
            "begins with": str(resumed.checkpoint) if resumed else "initial values",
            "writes to": start.settings.dump_folder,
        },
        settings=[each for each in host().settings(trainer_config) if each.changed],
        remarks=host().remarks(trainer_config),
        fits=states.fit,
        command=shlex.join(["torchrun", *start.arguments]),
    )


def _refuse(source: str, problems: Sequence[str]) -> None:
    if problems:
        raise EzpzError(
            "\n  ".join([f"{source}:", *problems]) if problems[1:] else f"{source}: {problems[0]}"
        )


def _refuse_model_alone(resumed: Resumption | None) -> None:
    if resumed and resumed.step is None:
        raise EzpzError(
            f"{resumed.checkpoint}: holds the model alone, so no run can resume from it. Add "
            "--resume-from-last-whole if an earlier step is whole. To start a new run from its "
            "weights, use --checkpoint.initial_load_path with its absolute path, and a new "
            "--dump_folder."
        )


def _model(flavor: Flavor, config: TrainerConfig, summary: ModelSummary) -> dict[str, str]:
    """Return what is trained, and how it is computed."""
    total, active = count(summary.total), count(summary.active)
    backend = f"{flavor.compute_backend} ({backend_of(flavor).summary})"
    return {
        "model": f"{flavor.name}: {total} parameters, {active} of them active",
        "experts": "none: every layer is dense" if flavor.is_dense else backend,
        "device": device.in_words(),
        "precision": host().precision_in_words(config, flavor),
    }


def _steps(resumed: Resumption | None, last: int) -> str:
    first = resumed.step if resumed and resumed.step else 1
    if first > last:
        return f"none: the checkpoint is of step {first - 1}, and training.steps is {last}"
    return f"{first} to {last}"


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
