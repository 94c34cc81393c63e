"""What a job asks of the trainer, in the trainer's own words, without importing it.

This is the text of the job over the settings of a job that says nothing, which are shipped for each
release (:mod:`.releases`). What depends on the machine, and whether settings fit together, only the
host knows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ezpz_moe.config.assets import EMBEDDED_TOKENIZER
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import Job
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.our_texts import is_ours
from ezpz_moe.hosts.releases import facts
from ezpz_moe.hosts.setting import Setting

_NAMES_THE_MODEL = ("model.name", "model.flavor")
FILES_OF_TEXT = {"training.dataset_path", "validation.dataset_path"}
_MODE = "activation_checkpoint.mode"
_TOKENIZERS = ("hf_assets_path", "model.hf_assets_path")
_VOCABULARY = "loss.loss_fn.global_vocab_size"


def settings_at_hand(job: Job, flavor: Flavor) -> list[Setting] | None:
    """Return what differs from the host's defaults, in its order, or None if only the host knows.

    Args:
        job: what is to be trained.
        flavor: the job's.
    """
    known = facts()
    # Telemetry sets how often the host logs; and 0.2's settings depend on one another.
    if known is None or not known.settings or flavor.is_watched or flavor.change:
        return None
    # Which text a file of the user's is, and whether it can be read, is found out by reading it.
    if not FILES_OF_TEXT.isdisjoint(job.values):
        return None
    rows = {each.path: each for each in known.settings}
    for path in _TOKENIZERS:
        if path in rows:
            rows[path] = replace(rows[path], value=str(EMBEDDED_TOKENIZER))
    if _VOCABULARY in rows:
        # A model of the host's own does not say it here.
        size = flavor.dimensions.vocab_size if flavor.dimensions else None
        rows[_VOCABULARY] = replace(rows[_VOCABULARY], value=size)
    _forget_defaults(rows, job)
    for key, value in job.values.items():
        if key not in _NAMES_THE_MODEL:
            _set(rows, job, key, value)
    return [row for row in rows.values() if row.changed]


def _forget_defaults(rows: dict[str, Setting], job: Job) -> None:
    """Remove what holds only in a job that says nothing about it, in place."""
    values = job.values
    if values.get(_MODE, "selective") != "selective":
        _remove(rows, "activation_checkpoint.")
    # Validation reads the training text, unless that is one of the host's.
    if not is_ours(values.get("training.dataset")):
        _remove(rows, "validator.dataloader.")


def _remove(rows: dict[str, Setting], section: str) -> None:
    for path in [path for path in rows if path.startswith(section)]:
        del rows[path]


def _set(rows: dict[str, Setting], job: Job, key: str, value: Any) -> None:
    """Put a job's key into the rows, in place."""
    section, _, name = key.rpartition(".")
    row = presumed_host().job_keys()[section][name]
    if row.path is None and row.flag is None:
        return  # no setting of the trainer's: a description, or a mode, for which it has classes
    if row.is_file:
        value = job.resolve(value)
    path = row.path or row.flag or key
    whole, _, index = path.rpartition(".")
    if path not in rows and isinstance(rows[whole].value if whole in rows else None, tuple):
        values = list(rows[whole].value)  # one of several, such as betas.0
        values[int(index)] = value
        path, value = whole, tuple(values)
    rows[path] = replace(rows[path], value=value) if path in rows else Setting(path, value, None)
