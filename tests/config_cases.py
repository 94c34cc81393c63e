"""The host's config of a job, and what a job that it excludes is told."""

import dataclasses
from typing import Any

import pytest

from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import check_host

check_host()  # before torchtitan is imported: it chooses the device

from ezpz_moe.hosts.titan.job import JobConfig, trainer_config  # noqa: E402


def conflict(flavor: str = "debugmodel_sdpa", **values: Any) -> str:
    with pytest.raises(EzpzError) as error:
        config(flavor, **values)
    return str(error.value)


def config(flavor: str = "debugmodel_sdpa", **values: Any) -> JobConfig:
    """The host's copy of a job's config; ``training__steps=3`` is ``[training] steps = 3``."""
    keys = {name.replace("__", "."): value for name, value in values.items()}
    return dataclasses.replace(trainer_config(Job(flavor=flavor, values=keys)))
