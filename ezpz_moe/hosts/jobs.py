"""Read jobs for the installed host, with its table of keys, before torch or the host is imported.

The host is recognized by its files (:func:`ezpz_moe.hosts.detect.presumed_host`).
"""

from __future__ import annotations

from pathlib import Path

from ezpz_moe.config import job
from ezpz_moe.config.job import Job, job_for_flavor
from ezpz_moe.hosts.detect import presumed_host

__all__ = ["find_job", "job_for_flavor", "load_job"]


def load_job(path: str | Path) -> Job:
    """Read a job file and check it, and check that its flavor exists.

    Raises:
        EzpzError: as :func:`ezpz_moe.config.job.load_job`.
    """
    # The presumed host: `host` would import torch, for seconds, to report a typing error.
    return job.load_job(path, presumed_host().job_keys())


def find_job(config: str) -> Job:
    """Return the job that ``--config`` names: a job's TOML by its path, or a flavor.

    Raises:
        EzpzError: as :func:`load_job` and :func:`job_for_flavor`.
    """
    return job.find_job(config, presumed_host().job_keys())
