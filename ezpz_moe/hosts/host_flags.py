"""Every flag of the installed host's command line, without importing torch or the host.

The flags of each release are shipped (:mod:`.releases`). Any other host, such as a checkout, is
imported and asked.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ezpz_moe.config.job import Job
from ezpz_moe.hosts.command_line import HostFlag
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.releases import facts

__all__ = ["HostFlag", "known_flags"]

SAYS_NOTHING = Job("debugmodel_sdpa")
"""A job that leaves everything to the defaults; the trainer's flags do not depend on the flavor."""

_WATCHED = """inherits = "debugmodel"
attention = "sdpa"
[router]
padding = "labels"
[telemetry]
every = 1
"""
# Their defaults are the model's, or lie on this machine.
_OF_THE_JOB = (
    "hf_assets_path",
    "loss.loss_fn.global_vocab_size",
    "model.flavor",
    "model.hf_assets_path",
)


def known_flags() -> list[HostFlag]:
    """Return the flags of the installed host, in its order; only an unknown host is imported.

    Raises:
        EzpzError: no host is installed that this package has a binding for.
    """
    known = facts()
    return asked_flags() if known is None else list(known.flags)


def asked_flags() -> list[HostFlag]:
    """Ask the host itself for its flags; this imports it.

    Raises:
        EzpzError: no host is installed that this package has a binding for.
    """
    # It imports torch, which no host of a known release needs for this.
    from ezpz_moe.hosts.precision import as_on_an_accelerator

    check_host()
    flags: dict[tuple[str, str], HostFlag] = {}
    # On every machine as on one with an accelerator: the defaults do not depend on this one.
    with as_on_an_accelerator(), tempfile.TemporaryDirectory() as folder:
        for job in _jobs(Path(folder)):
            for flag in host().command_line(host().trainer_config(job)):
                # The first job says nothing, so its defaults are those of a job that says nothing.
                flags.setdefault((flag.name, flag.after), flag)
    return [_portable(flag) for flag in flags.values()]


def _jobs(folder: Path) -> Iterator[Job]:
    """Yield jobs that together have every flag: some are there only in some jobs."""
    yield SAYS_NOTHING
    # A text of the host's has other settings than ours.
    yield replace(
        SAYS_NOTHING, values={"training.dataset": "c4", "validation.dataset": "c4_validation"}
    )
    (folder / "watched.toml").write_text(_WATCHED, encoding="utf-8")
    yield Job("watched", path=folder / "job.toml")


def _portable(flag: HostFlag) -> HostFlag:
    return replace(flag, default="") if flag.name in _OF_THE_JOB else flag
