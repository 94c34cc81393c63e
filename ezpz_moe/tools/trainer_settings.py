"""The trainer's settings that this package has to know before and after a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezpz_moe.config.job import Job
from ezpz_moe.hosts.dcp.paths import complete_steps

_NEWEST = -1  # the default of ``checkpoint.load_step``


def pipeline_degree(job: Job, host_flags: Sequence[str]) -> int:
    return max(1, number(job, host_flags, "parallelism.pipeline_parallel_degree", default=1))


def number(job: Job, host_flags: Sequence[str], key: str, *, default: int) -> int:
    """Return an integer that the job or a flag of the trainer's says; a flag wins over the job."""
    return _told(job, host_flags, key, int, default)


def optional_number(job: Job, host_flags: Sequence[str], key: str) -> int | None:
    """Return the same of a setting that is None unless it is said, which a flag may say again."""
    return _told(job, host_flags, key, lambda said: None if said == "None" else int(said), None)


def _told(
    job: Job, host_flags: Sequence[str], key: str, read: Callable[[str], Any], default: Any
) -> Any:
    parser = _parser()
    default = job.values.get(key, default)
    parser.add_argument(*_spellings(key), dest="told", type=read, default=default)
    return parser.parse_known_args(host_flags)[0].told


@dataclass(frozen=True)
class CheckpointSettings:
    """What the trainer will be told about checkpoints.

    Attributes:
        is_enabled: whether it loads the newest, if there is one.
        is_saving: whether it writes any.
        dump_folder: where a run writes everything, as it was given.
        folder: where the checkpoints are, each in a folder ``step-N``.
        load_step: the step that it must resume from; None for the newest.
        last_step: the step after which it ends; None if that is the trainer's own default.
        loads_step: whether a resumed run goes on at the step after the checkpoint's.
    """

    is_enabled: bool
    is_saving: bool
    dump_folder: str
    folder: Path
    load_step: int | None
    last_step: int | None = None
    loads_step: bool = True

    def newest(self) -> int | None:
        """Return the newest step that is complete, which has its metadata."""
        return max(complete_steps(self.folder), default=None)


def checkpoint_settings(job: Job, host_flags: list[str]) -> CheckpointSettings:
    """Return what the job and the trainer's own flags say; a flag wins over the job."""
    values, parser = job.values, _parser()
    _add_switch(parser, "checkpoint.enable", values.get("checkpoint.enable", False))
    _add_switch(parser, "checkpoint.load_only", values.get("checkpoint.load_only", False))
    parser.add_argument(
        *_spellings("checkpoint.folder"),
        dest="folder",
        default=values.get("checkpoint.folder", "checkpoint"),
    )
    parser.add_argument(
        *_spellings("dump_folder"),
        *_spellings("job.dump_folder"),  # torchtitan 0.2
        dest="dump_folder",
        default=values.get("job.dump_folder", "./outputs"),
    )
    parser.add_argument(
        *_spellings("checkpoint.load_step"),
        dest="load_step",
        type=int,
        default=values.get("checkpoint.load_step", _NEWEST),
    )
    parser.add_argument(
        *_spellings("training.steps"),
        dest="last_step",
        type=int,
        default=values.get("training.steps"),
    )
    parser.add_argument(
        *_spellings("checkpoint.exclude_from_loading"),
        dest="left_out",
        nargs="*",
        default=values.get("checkpoint.exclude_from_loading", []),
    )
    # The trainer parses all its flags; only the ones above matter here.
    told = parser.parse_known_args(host_flags)[0]
    return CheckpointSettings(
        is_enabled=told.enable,
        is_saving=told.enable and not told.load_only,
        dump_folder=told.dump_folder,
        folder=Path(told.dump_folder, told.folder),
        load_step=None if told.load_step == _NEWEST else told.load_step,
        last_step=told.last_step,
        loads_step="train_state" not in told.left_out,
    )


def folder_of_run(named: Path) -> Path:
    """Return what was named, or the dump folder of the job that was.

    Raises:
        EzpzError: as :func:`ezpz_moe.hosts.jobs.load_job`.
    """
    if named.suffix != ".toml":
        return named
    from ezpz_moe.hosts.jobs import load_job

    return Path(checkpoint_settings(load_job(named), []).dump_folder)


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: --checkpoint.enable must not match a longer flag that is only the trainer's.
    return argparse.ArgumentParser(add_help=False, allow_abbrev=False)


def _add_switch(parser: argparse.ArgumentParser, key: str, default: bool) -> None:
    """Add ``--section.name`` and ``--section.no-name``, of which the last one given wins."""
    section, _, name = key.rpartition(".")
    parser.add_argument(*_spellings(key), dest=name, action="store_true", default=default)
    # The host's parser, tyro, puts `no-` before the last part of the name.
    parser.add_argument(*_spellings(f"{section}.no-{name}"), dest=name, action="store_false")


def _spellings(key: str) -> list[str]:
    """Return the spellings of a flag: the host accepts both underscores and dashes."""
    return list(dict.fromkeys([f"--{key}", f"--{key.replace('_', '-')}"]))
