"""What to do about a trainer flag that the installed host does not take.

What became of a flag is in the tables of the job's keys, of every generation.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from ezpz_moe.config.job import is_slip
from ezpz_moe.config.older_keys import OLDER_KEYS, OlderKey
from ezpz_moe.errors import did_you_mean
from ezpz_moe.hosts.detect import HOSTS, presumed_host


def remedy(spelled: str, taken: Collection[str]) -> str:
    """Return what to do about a flag; empty if the host takes it.

    Args:
        spelled: the flag as a path: ``--a.b-c`` is ``a.b_c``.
        taken: the host's flags, as paths.
    """
    section, _, name = spelled.rpartition(".")
    no = "no_" if name.startswith("no_") else ""  # --a.no-b turns b off
    path = f"{section}.{name.removeprefix(no)}".lstrip(".")  # some flags have no section
    if path in taken:
        return ""
    if (key := keys_by_spelling().get(path)) is None:
        if older := OLDER_KEYS.get(path):
            return _older(older, no, taken)
        siblings = (each.rpartition(".")[2] for each in taken if each.startswith(f"{section}."))
        near = did_you_mean(name, (each for each in siblings if is_slip(name, each)))
        return f"torchtitan itself has no such flag.{near}"
    section, _, name = key.rpartition(".")
    row = presumed_host().job_keys()[section].get(name)
    if row is None:  # the key belongs to a newer host
        return f"{presumed_host().name} has no such setting"
    # A setting keeps its name, moves, or gets a flag of its own; any of these may be what the host
    # takes.
    for now in (row.path, row.flag, key):
        if now and now in taken:
            return f"now {dashed(now, no)}"
    if row.path and (whole := row.path.rpartition(".")[0]) in taken:
        return f"now one of the values of {dashed(whole)}"
    return row.message or f"no longer a flag: set [{section}] {name} in the job's TOML"


def _older(older: OlderKey, no: str, taken: Collection[str]) -> str:
    """Return what to do about a flag of a release before 0.2."""
    if not older.now:
        return older.note
    # Of a switch it is known which value it stands for: what to type instead can be said whole.
    value = older.renewed(not no) if older.value else None
    if value is not None:
        no = "no_" if value is False else ""
    section, _, name = older.now.rpartition(".")
    now = remedy(f"{section}.{no}{name}", taken) or f"now {dashed(older.now, no)}"
    if value is not None:
        return f"{now} {value}" if isinstance(value, str) and now.startswith("now --") else now
    # How the values differ says nothing where the successor is gone too.
    return f"{now} ({older.note})" if older.note and now.startswith("now ") else now


def dashed(path: str, no: str = "") -> str:
    """Return a flag as it is written, turned off with ``no = "no_"``."""
    section, dot, name = path.rpartition(".")
    return f"--{section}{dot}{no}{name}".replace("_", "-")


@cache
def keys_by_spelling() -> dict[str, str]:
    """Map a setting, as any generation of the host spells it, to the job's key for it."""
    keys: dict[str, str] = {}
    for each in HOSTS:
        for section, rows in each.job_keys().items():
            for name, row in rows.items():
                for spelled in (row.path, row.flag, f"{section}.{name}"):
                    if spelled:
                        # The first generation that knows a spelling decides.
                        keys.setdefault(spelled, f"{section}.{name}")
    return keys
