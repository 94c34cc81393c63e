"""Every key of a job: its type, its default, torchtitan 0.3's flag, and whether 0.2 has it."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import tables

import ezpz_moe
from ezpz_moe.compute import native
from ezpz_moe.config.job import Job, allowed
from ezpz_moe.config.keys import Key, Keys
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.titan.job_keys import KEYS
from ezpz_moe.hosts.titan.job_keys_2026_08 import KEYS as KEYS_2026_08
from ezpz_moe.hosts.titan_0_2.job_keys import KEYS as KEYS_0_2

PAGE = "docs/reference/job.md"
HOST = "0.3"
"""The generation whose defaults and flags the page has."""

_SETTINGS = (
    {},
    # These settings' fields exist only together.
    {"activation_checkpoint.mode": "memory_budget", "compile.enable": True},
)
_SUBCOMMANDS = {
    "force_recompute_mm_shapes_by_fqns": "selective",
    "experts": "selective",
    "memory_budget": "memory_budget",
    "visualize_memory_budget_pareto": "memory_budget",
}
"""Of which mode of activation checkpointing a field is; the others are of each but none."""

_REQUIRED = ("model.name", "model.flavor")


def made() -> dict[str, dict[str, str]]:
    """Return the tables by document and name.

    Raises:
        RuntimeError: another generation is installed than the one that the page is about.
    """
    if host().generation != HOST:
        raise RuntimeError(f"{PAGE} is made with torchtitan {HOST}, not with {host().name}")
    return {
        PAGE: {
            "keys": _sections(KEYS),
            "gone": tables.markdown(_gone()),
            "since August 2026": tables.markdown(_newer()),
        }
    }


def _sections(keys: Keys) -> str:
    values, flags = _of_the_host()
    parts = []
    for section, rows in keys.items():
        taken = {name: key for name, key in rows.items() if not key.message}
        if taken:
            lines = (_row(section, name, key, values, flags) for name, key in taken.items())
            parts.append(f"### `[{section}]`\n\n{tables.markdown(lines)}")
    return "\n" + "\n".join(parts) + "\n"


def _of_the_host() -> tuple[Mapping[str, Any], frozenset[str]]:
    """Return the settings of a job that says nothing by their paths, and the trainer's flags."""
    # As on an accelerator: on a CPU without bfloat16 instructions a job has another default.
    os.environ[native.VARIABLE] = "bfloat16"
    native.native_halves.cache_clear()
    logging.disable(logging.WARNING)
    values: dict[str, Any] = {}
    flags: frozenset[str] = frozenset()
    for settings in _SETTINGS:
        config = _config(settings)
        found = {each.path: each.value for each in host().settings(config)}
        values = found | values
        flags |= host().flags(config)
    return values | _of_no_field(), flags


def _config(settings: Mapping[str, Any]) -> Any:
    return host().trainer_config(Job("debugmodel", values=settings))


def _of_no_field() -> dict[str, Any]:
    """Return what a job does without the keys that no field of the trainer's config says."""
    from ezpz_moe.hosts.titan.models import host_spec

    mode = "activation_checkpoint.mode"
    policy = _config({}).activation_checkpoint
    (default,) = (
        value
        for value in get_args(KEYS["activation_checkpoint"]["mode"].type)
        if value != "memory_budget" and _config({mode: value}).activation_checkpoint == policy
    )
    comm_backend = inspect.signature(host_spec).parameters["moe_comm_backend"].default
    return {mode: default, "parallelism.expert_parallel_comm_backend": comm_backend}


def _row(
    section: str, name: str, key: Key, values: Mapping[str, Any], flags: frozenset[str]
) -> dict[str, str]:
    return {
        "key": f"`{name}`",
        "type": allowed(key),
        "default": _default(f"{section}.{name}", key, values),
        "torchtitan 0.3": _flag(f"{section}.{name}", key.path or key.flag, flags),
        "torchtitan 0.2": _in_0_2(section, name, key),
    }


def _default(name: str, key: Key, values: Mapping[str, Any]) -> str:
    if name in _REQUIRED:
        return "required"
    path = key.path or key.flag or name
    value = values.get(path)
    parent, _, index = path.rpartition(".")
    if index.isdigit():
        value = values[parent][int(index)]
    return "" if value is None else f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    package = Path(ezpz_moe.__file__).parent.parent
    if isinstance(value, str) and Path(value).is_relative_to(package):
        value = str(Path(value).relative_to(package))
    return json.dumps(value)


def _flag(name: str, path: str | None, flags: frozenset[str]) -> str:
    """Return the trainer's flag for a key; empty if it has none."""
    if name == "activation_checkpoint.mode":
        return "`activation-checkpoint:MODE`"
    if path is None:
        return ""
    parent, _, index = path.rpartition(".")
    if index.isdigit() and parent in flags:
        return f"{_option(parent)}, number {int(index) + 1}"
    if path in flags:
        return _option(path)
    section, _, field = path.partition(".")
    if section == "activation_checkpoint":
        mode = _SUBCOMMANDS.get(field, "MODE").replace("_", "-")
        return f"`activation-checkpoint:{mode}`, then {_option(path)}"
    return ""


def _option(path: str) -> str:
    return f"`--{path.replace('_', '-')}`"


def _in_0_2(section: str, name: str, key: Key) -> str:
    old = KEYS_0_2.get(section, {}).get(name)
    if old is None:
        return "no"
    if old.message:
        return f"no; takes {_values(old.unless)}" if old.unless else "no"
    return "yes" if allowed(old) == allowed(key) else f"yes: {allowed(old)}"


def _gone() -> Iterator[dict[str, str]]:
    """Yield a row for the keys of a section that are gone for the same reason."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for section, rows in KEYS.items():
        for name, key in rows.items():
            if key.message:
                alike.setdefault((section, key.message, _values(key.unless)), []).append(name)
    for (section, message, unless), names in alike.items():
        keys = ", ".join(f"`{name}`" for name in names)
        yield {"section": f"`[{section}]`", "keys": keys, "taken as": unless, "why": message}


def _newer() -> Iterator[dict[str, str]]:
    """Yield a row for each key that hosts since August 2026 take otherwise."""
    for section, rows in KEYS_2026_08.items():
        for name, key in rows.items():
            if key != KEYS.get(section, {}).get(name):
                yield {
                    "key": f"`{section}.{name}`",
                    "type": "" if key.message else allowed(key),
                    "the trainer's flag": "" if key.message else _option(key.path or key.flag),
                    "why it is gone": key.message,
                }


def _values(values: tuple[Any, ...]) -> str:
    return ", ".join(f"`{json.dumps(value)}`" for value in values)
