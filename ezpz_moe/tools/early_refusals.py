"""Refuse at once what every rank would refuse after twenty seconds of imports.

Only what is certain: the host says the rest, and everything of a host that is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ezpz_moe.config.flavors import Flavor, load_flavor, with_attention
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import accelerator
from ezpz_moe.hosts.counts import counts_at_hand
from ezpz_moe.hosts.limits import memory_problems
from ezpz_moe.hosts.releases import facts
from ezpz_moe.tools.trainer_settings import number, pipeline_degree

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


def refuse_batch(job: Job, host_flags: Sequence[str]) -> None:
    """Refuse a batch that no machine can hold.

    Raises:
        EzpzError: says what it would take.
    """
    known, counted = facts(), counts_at_hand(load_flavor(job.flavor, near=job.folder))
    if known is None or counted is None or _may_change_the_model(host_flags):
        return
    # The stages of a pipeline compute a smaller microbatch at once.
    if pipeline_degree(job, host_flags) > 1:
        return
    defaults = {row.path: row.value for row in known.settings}
    if _BATCH not in defaults or _LENGTH not in defaults:
        return
    batch, length = (number(job, host_flags, k, default=defaults[k]) for k in (_BATCH, _LENGTH))
    for problem in memory_problems(_BATCH, batch, batch * length, counted.dim):
        where = f"{job.source} and the command line" if host_flags else job.source
        raise EzpzError(f"{where}: {problem}")


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
    if name := with_attention(flavor.name, _RUNS_EVERYWHERE, near=near):
        return f"Use flavor {name}."
    return f'Set attention = "{_RUNS_EVERYWHERE}" in {flavor.source}.'
