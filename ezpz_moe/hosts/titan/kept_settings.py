"""Say which of the optimizer's settings a resumed run takes from its checkpoint, not from its job.

The host saves the settings of every group of parameters, and loading replaces the job's. Only the
learning rate returns to the job's schedule, after one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torchtitan.components.checkpointer import LR_SCHEDULER, OPTIMIZER
from torchtitan.tools.logging import logger

from ezpz_moe.hosts.resuming import rates_differ

Settings = list[dict[str, Any]]
"""By group of parameters."""

_RATES = ("lr", "initial_lr")


def settings(states: Mapping[str, Any]) -> Settings:
    """Return the settings of the optimizers in ``states``: before loading, the job's."""
    return [
        {name: value for name, value in group.items() if not name.startswith("param")}
        for optimizer in states.get(OPTIMIZER, ())
        for group in optimizer.param_groups
    ]


def log_kept(states: Mapping[str, Any], asked: Settings) -> None:
    """Log what differs between ``asked``, the job's settings, and those that were loaded."""
    loaded = settings(states)
    notes = [*_kept(asked, loaded), *_rates(loaded, list(states.get(LR_SCHEDULER, ())))]
    for note in dict.fromkeys(notes):  # groups and stages say the same
        logger.warning(f"ezpz_moe: {note}.")


def _kept(asked: Settings, loaded: Settings) -> Iterator[str]:
    for job, saved in zip(asked, loaded, strict=True):
        for name in sorted(job.keys() - set(_RATES)):
            if job[name] != saved[name]:
                yield (
                    f"the optimizer keeps {name} = {saved[name]} from the checkpoint: this job's "
                    f"{job[name]} has no effect on a resumed run"
                )


def _rates(loaded: Settings, schedulers: list[Any]) -> Iterator[str]:
    ours = [(rate, each.last_epoch) for each in schedulers for rate in each.get_last_lr()]
    # Not strict: either may have been excluded from loading, and then there is nothing to compare.
    for saved, (rate, steps) in zip(loaded, ours, strict=False):
        if note := rates_differ(steps + 1, saved=saved["lr"], ours=rate):
            yield note
