"""Flatten a trainer's config to lines ``path = value``, with the host's defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

from torchtitan.config import JobConfig

from ezpz_moe.hosts.setting import Setting, flat
from ezpz_moe.hosts.titan_0_2.job_keys import AS_0_2_DOES


def settings(config: Any) -> list[Setting]:
    """Return every field of the trainer's config, in the host's order."""
    defaults = dict(flat(dataclasses.asdict(JobConfig())))
    return [
        Setting(path, value, defaults.get(path))
        for path, value in flat(dataclasses.asdict(config))
        if path not in AS_0_2_DOES  # accepted without effect
    ]
