"""Flatten a trainer's config to lines ``path = value``, with the host's defaults."""

from __future__ import annotations

import dataclasses

from torchtitan.trainer import Trainer

from ezpz_moe.hosts.setting import Setting, flat

_OF_RECORDS = {"metrics.warmup_steps", "metrics.model", "metrics.job"}
"""What :class:`.metrics.RouterMetrics` writes into records: copies that nobody sets."""


def settings(config: Trainer.Config) -> list[Setting]:
    """Return every field of the trainer's config except the model, in the host's order."""
    # With the model, because `to_dict` of a config without one fails.
    defaults = dict(flat(Trainer.Config(model_spec=config.model_spec).to_dict()))
    # Fields of JobConfig that the host does not have, such as `origin`, are not settings.
    ours = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(Trainer.Config)
    }
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name != "model_spec" and name not in ours
    }
    return [
        Setting(path, value, defaults.get(path))
        for path, value in flat(values)
        if path not in _OF_RECORDS
    ]
