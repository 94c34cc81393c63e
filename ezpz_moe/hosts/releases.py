"""What is known of the installed host without importing it: facts shipped for each release.

``releases/HOST.json`` has the flags of the host's command line and the sizes of the models that our
flavors name. ``scripts/make_host_facts.py`` asks the host itself for them. A host is recognized by
the content of its files, so a checkout or an edited release is not taken for another.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.hosts.command_line import HostFlag
from ezpz_moe.hosts.installed import host
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.hosts.setting import Setting

FOLDER = Path(__file__).with_name("releases")
"""A file for each release of the host."""


@dataclass(frozen=True)
class KnownModel:
    """One of the host's own models, as a flavor's ``base`` and ``[change]`` name it.

    Attributes:
        summary: its dimensions and counts.
        needs_accelerator: whether its own attention has no backward on the CPU.
    """

    summary: ModelSummary
    needs_accelerator: bool


@dataclass(frozen=True)
class Facts:
    """What is shipped about a release.

    Attributes:
        flags: of its command line, in its order.
        models: by :func:`model_key`.
        settings: of a job that says nothing, on a machine with an accelerator; none for 0.2.
    """

    flags: Sequence[HostFlag]
    models: Mapping[str, KnownModel]
    settings: Sequence[Setting] = ()


def model_key(flavor: Flavor) -> str:
    """Return what a flavor with ``base`` has in :attr:`Facts.models`: the base, and its changes."""
    changes = flavor.change.values if flavor.change else {}
    return " ".join([str(flavor.base), *(f"{key}={changes[key]}" for key in sorted(changes))])


@cache
def facts() -> Facts | None:
    """Return what is shipped for the installed host; None for an unknown host."""
    found = host()
    if found is None:
        return None
    own = fingerprint(found.folder)
    for file in FOLDER.glob("*.json"):
        shipped = json.loads(file.read_text(encoding="utf-8"))
        if shipped["fingerprint"] == own:
            models = {
                key: KnownModel(ModelSummary(**model["summary"]), model["needs_accelerator"])
                for key, model in shipped["models"].items()
            }
            flags = [HostFlag(**flag) for flag in shipped["flags"]]
            return Facts(flags, models, [_setting(row) for row in shipped["settings"]])
    return None


def _setting(row: Mapping[str, str]) -> Setting:
    # Values as Python writes them, for JSON has no tuples.
    values = (ast.literal_eval(row[name]) for name in ("value", "default"))
    return Setting(row["path"], *values)


def fingerprint(folder: Path) -> str:
    """Return a hash of all Python files below ``folder``, the host's package."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
