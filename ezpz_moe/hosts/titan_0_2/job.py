"""Turn a job into torchtitan 0.2's ``JobConfig``.

The host reads the TOML itself. It merges the ``JobConfig`` of the module that
``job.custom_config_module`` names into its own. If the job does not set a field, it keeps the
host's own default, with these exceptions:

- the tokenizer and the training text are the embedded ones, which need no download;
- validation has the batch size and the sequence length of training, as in 0.3;
- on a CPU that emulates bfloat16, ``training.mixed_precision_param`` is ``"float32"``.
"""

# No `from __future__ import annotations`: the host reads the types of fields.

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torchtitan.config import JobConfig
from torchtitan.config.manager import ConfigManager
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.job import MODEL_NAME, Job, load_job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.at_hand import at_hand
from ezpz_moe.hosts.precision import PARAM, job_line, trains_in_float32
from ezpz_moe.hosts.titan_0_2.data import choose_text
from ezpz_moe.hosts.titan_0_2.job_keys import AS_0_2_DOES, KEYS
from ezpz_moe.hosts.titan_0_2.train_spec import register_flavors

# The two spellings that the host itself looks for.
_FILE_FLAGS = ("--job.config_file", "--job.config-file")

# Path -> type and default, where they differ from the host's. None means that `complete` fills it.
_OUR_DEFAULTS: Mapping[str, tuple[Any, Any]] = {
    "model.name": (str, MODEL_NAME),
    "model.hf_assets_path": (str, str(EMBEDDED_TOKENIZER)),
    "training.dataset": (str | None, None),
    "validation.dataset": (str | None, None),
    "validation.local_batch_size": (int | None, None),
    "validation.seq_len": (int | None, None),
}


def job_config() -> type[JobConfig]:
    """Return what the host merges into its ``JobConfig``, for the job on its command line.

    It checks the job's file before the host reads it, and registers its flavors.

    Raises:
        EzpzError: the file is wrong, or asks for what this host does not have.
    """
    # From sys.argv, because the host asks a module for this class and passes nothing.
    path = _job_file(sys.argv[1:])
    # Without a file the flavor is a flag, which the host reads later.
    job = Job(flavor="") if path is None else load_job(path, KEYS)
    extended = _extended(JobConfig, _nested(_fields()))
    refuse_missing(job)
    register_flavors(job, complete=complete)
    return extended


def trainer_config(job: Job, host_flags: Sequence[str] = ()) -> JobConfig:
    """Return the host's config of a job after its own flags, completed, to look at.

    Raises:
        EzpzError: the data are wrong, or the job asks for what this host does not have.
    """
    refuse_missing(job)
    # The host's own merge, to look at the very config that a run would have.
    config = ConfigManager._merge_configs(JobConfig, _extended(JobConfig, _nested(_fields())))()
    # Not among the values: a flavor may be trained without a job's file.
    config.model.flavor = job.flavor
    for key, value in job.values.items():
        section, _, name = key.rpartition(".")
        setattr(_at(config, section), name, value)
    if host_flags:
        with at_hand().importing():  # a run needs nothing of this
            from ezpz_moe.hosts.told import changed_by
        config = changed_by(config, host_flags)
    complete(config, job)
    return config


def complete(config: Any, job: Job) -> None:
    """Fill what the host's config leaves open, and make paths absolute, in place.

    Raises:
        EzpzError: the data are wrong.
    """
    choose_text(config, job)
    is_ours = PARAM not in job.values and trains_in_float32(utils.device_type)
    # Only in a rank of a run: `show` has its own way to say this.
    if is_ours and config.training.mixed_precision_param == "float32" and "RANK" in os.environ:
        logger.info(job_line())
    for name in ("local_batch_size", "seq_len"):
        if getattr(config.validation, name) is None:
            setattr(config.validation, name, getattr(config.training, name))
    # The job's paths may be relative to its file, and the host knows only the working directory.
    for path, key in _rows():
        section, name = _at(config, path.rpartition(".")[0]), path.rpartition(".")[2]
        if key.is_file and getattr(section, name, None):
            setattr(section, name, job.resolve(getattr(section, name)))


def refuse_missing(job: Job) -> None:
    """Refuse keys that the installed 0.2 lacks: 0.2.1 has not all of 0.2.2's, and would crash.

    Raises:
        EzpzError: the job sets a key that this host does not have.
    """
    host = JobConfig()
    missing = [path for path in job.values if _at(host, path, None) is _NOTHING]
    if missing:
        raise EzpzError(
            f"{job.source}: {', '.join(missing)}: the installed torchtitan 0.2 has no such "
            "setting, but a later 0.2 or 0.3 does. Leave it out."
        )


def _job_file(arguments: Sequence[str]) -> Path | None:
    """Return the job's file on the host's command line, found as the host finds it."""
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in _FILE_FLAGS and (equals or position + 1 < len(arguments)):
            return Path(value if equals else arguments[position + 1])
    return None


def _fields() -> dict[str, tuple[Any, Any]]:
    """Return path -> type and default of every field of ours; some are hidden from the help.

    The host refuses a key that it has no field for, even if the key asks for what it does anyway.
    Such keys get a field without effect, which the help does not show.
    """
    without_effect = {
        path: (Annotated[type(values[0]), tyro.conf.Suppress], values[0])
        for path, values in AS_0_2_DOES.items()
    }
    precision: dict[str, tuple[Any, Any]] = {}
    if trains_in_float32(utils.device_type):
        precision[PARAM] = (Literal["bfloat16", "float32"], "float32")
    return {**_OUR_DEFAULTS, **precision, **without_effect}


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    sections: dict[str, Any] = {}
    for path, value in fields.items():
        section, _, name = path.rpartition(".")
        sections.setdefault(section, {})[name] = value
    return sections


def _extended(base: Any, changes: Mapping[str, Any]) -> type:
    """Return ``base`` with the fields ``changes``, each a section or a type with its default."""
    known = {field.name: field.type for field in dataclasses.fields(base)} if base else {}
    fields: list[Any] = []
    for name, change in changes.items():
        if isinstance(change, dict):
            kind = _extended(known.get(name), change)
            fields.append((name, kind, dataclasses.field(default_factory=kind)))
        else:
            kind, default = change
            fields.append((name, kind, _default(default)))
    return dataclasses.make_dataclass(
        base.__name__ if base else "Section", fields, bases=(base,) if base else ()
    )


def _default(value: Any) -> Any:
    if isinstance(value, list):
        # A dataclass refuses a mutable default.
        return dataclasses.field(default_factory=lambda: list(value))
    return dataclasses.field(default=value)


def _rows() -> Iterator[tuple[str, Any]]:
    for section, keys in KEYS.items():
        for name, key in keys.items():
            yield f"{section}.{name}", key


_NOTHING = object()


def _at(config: Any, path: str, *default: Any) -> Any:
    """Return what a config holds at a dotted path; ``_NOTHING`` if it ends early and may."""
    for name in path.split("."):
        config = getattr(config, name, _NOTHING) if default else getattr(config, name)
    return config
