"""Refuse at once what every rank would refuse after twenty seconds of imports.

Only what is certain: the host says the rest, and everything of a host that is not known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ezpz_moe.config.flavors import Flavor, load_flavor, with_variant
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import accelerator
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.limits import degree_problems, learning_rate_problems, memory_problems
from ezpz_moe.hosts.releases import facts
from ezpz_moe.tools.trainer_settings import number, optional_number, pipeline_degree

_DEGREE = "parallelism.expert_parallel_degree"
_STEPS, _SCHEDULE = "training.steps", "lr_scheduler.total_steps"
_BATCH, _LENGTH = "training.local_batch_size", "training.seq_len"
_RUNS_EVERYWHERE = "sdpa"
# With these the model may be another one, or stand for another machine.
_CHANGE_THE_MODEL = ("override.", "module", "config", "model.", "job.config", "comm.mode")


def refuse_attention(job: Job, host_flags: Sequence[str]) -> None:
    """Refuse attention without a backward on the CPU, if there is certainly nothing else here.

    Raises:
        EzpzError: names a flavor that trains here.
    """
    if _may_change_the_model(host_flags):
        return
    flavor = load_flavor(job.flavor, near=job.folder)
    if _needs_accelerator(flavor) and accelerator.has_certainly_none():
        attention = flavor.attention or "torchtitan's own"
        raise EzpzError(
            f"{job.source}: the attention of flavor {flavor.name!r} ({attention}) has no backward "
            "on the CPU, and this machine has no accelerator. "
            f"{_with_sdpa(flavor, job.folder)}"
        )


def refuse_sizes(job: Job, host_flags: Sequence[str]) -> None:
    """Refuse a batch that no machine can hold, a degree that does not divide the experts, and a run
    that is longer than its schedule.

    Raises:
        EzpzError: says what the batch would take, which degrees do, or where the schedule ends.
    """
    if _may_change_the_model(host_flags):
        return
    flavor = load_flavor(job.flavor, near=job.folder)
    where = f"{job.source} and the command line" if host_flags else job.source
    for problems in (_of_batch, _of_degree, _of_schedule):
        for problem in problems(job, host_flags, flavor):
            raise EzpzError(f"{where}: {problem}")


def _of_batch(job: Job, host_flags: Sequence[str], flavor: Flavor) -> Iterator[str]:
    known, counted = facts(), counts_at_hand(flavor)
    if known is None or counted is None:
        return
    # The stages of a pipeline compute a smaller microbatch at once.
    if pipeline_degree(job, host_flags) > 1:
        return
    defaults = {row.path: row.value for row in known.settings}
    if _BATCH not in defaults or _LENGTH not in defaults:
        return
    batch, length = (number(job, host_flags, k, default=defaults[k]) for k in (_BATCH, _LENGTH))
    yield from memory_problems(_BATCH, batch, batch * length, counted.dim)


def _of_degree(job: Job, host_flags: Sequence[str], flavor: Flavor) -> Iterator[str]:
    degree, experts = number(job, host_flags, _DEGREE, default=1), _experts(flavor)
    if degree > 1 and experts:
        yield from degree_problems(degree, experts, flavor.name)


def _of_schedule(job: Job, host_flags: Sequence[str], flavor: Flavor) -> Iterator[str]:
    known = facts()
    defaults = {row.path: row.value for row in known.settings} if known else {}
    if _STEPS in defaults:
        steps = number(job, host_flags, _STEPS, default=defaults[_STEPS])
        yield from learning_rate_problems(steps, optional_number(job, host_flags, _SCHEDULE))


def _experts(flavor: Flavor) -> Mapping[str, int]:
    """Return the experts of each layer by its number; of one of them, if all have as many."""
    if flavor.dimensions is not None:
        return {str(n): of.num_experts for n, of in flavor.dimensions.layer_sizes.items()}
    counted = counts_at_hand(flavor)
    number_of = counted.num_experts if counted else 0
    return {"": number_of} if isinstance(number_of, int) and number_of else {}


def _may_change_the_model(host_flags: Sequence[str]) -> bool:
    names = [word.lstrip("-").replace("_", "-") for word in host_flags if word.startswith("--")]
    return any(name.startswith(_CHANGE_THE_MODEL) for name in names)


def _needs_accelerator(flavor: Flavor) -> bool:
    if flavor.attention is not None:
        return flavor.attention != _RUNS_EVERYWHERE
    known = facts()
    model = known.models.get(str(flavor.base)) if known else None
    return model is not None and model.needs_accelerator


def _with_sdpa(flavor: Flavor, near: Path | None) -> str:
    """Say how to have the same flavor with SDPA."""
    if name := with_variant(flavor.name, "attention", _RUNS_EVERYWHERE, near=near):
        return f"Use flavor {name}."
    return f'Set attention = "{_RUNS_EVERYWHERE}" in {flavor.source}.'
