"""What keys of other projects are called here: hints after an unknown key.

The table is data, ``foreign_keys.toml``. It also makes the tables of docs/guides/moving.md, and
``ezpz-moe convert --from`` copies by it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import tomli

from ezpz_moe.config.flavor_schema import Dimensions
from ezpz_moe.errors import did_you_mean

_PAGE = "docs/guides/moving.md"
_CUTOFF = 0.85
"""How alike a name must be to a foreign key; higher than for our own, which are likelier."""


@dataclass(frozen=True)
class ForeignKey:
    """A key of another project.

    Attributes:
        project: its name.
        key: the key, as that project writes it.
        ours: the key here, such as "router_top_k", "balance.aux_loss" or "job: section.key"; empty
            if there is none.
        factor: what the number is multiplied by, in words; empty for 1.
        note: what differs.
    """

    project: str
    key: str
    ours: str = ""
    factor: str = ""
    note: str = ""

    @property
    def place(self) -> str:
        """Our key as it is written: "[balance] aux_loss"."""
        section, _, name = self.ours.removeprefix("job: ").rpartition(".")
        where = f"[{section}] {name}" if section else name
        return f"{where} of the job" if self.ours.startswith("job: ") else where

    @property
    def is_size(self) -> bool:
        """Whether it is one of a model's sizes."""
        return self.ours in Dimensions.model_fields or self.ours.startswith("rope.")

    @property
    def is_coefficient(self) -> bool:
        """Whether it is a loss's coefficient, whose unit and scope matter."""
        return self.ours in ("balance.aux_loss", "balance.z_loss")

    def __str__(self) -> str:
        if not self.ours:
            return f"{self.project}'s {self.key}: {self.note}"
        factor = f", times {self.factor}" if self.factor else ""
        return f"{self.project}'s {self.key} is {self.place} here{factor}"


@dataclass(frozen=True)
class Project:
    """A project with its keys, and the version of it that was run beside this package.

    Attributes:
        compared: keys without a place in a flavor, with which a flavor's model is compared.
        needless: keys about files, tokens, generation, initial values and kernels.
    """

    id: str
    name: str
    version: str
    keys: tuple[ForeignKey, ...]
    compared: tuple[str, ...] = ()
    needless: tuple[str, ...] = ()


@cache
def projects() -> dict[str, Project]:
    """Return the table, by the projects' ids."""
    text = Path(__file__).with_name("foreign_keys.toml").read_text(encoding="utf-8")
    return {
        each["id"]: Project(
            each["id"],
            each["name"],
            each["version"],
            tuple(ForeignKey(each["name"], **row) for row in each["keys"]),
            tuple(each.get("compared", ())),
            tuple(each.get("needless", ())),
        )
        for each in tomli.loads(text)["project"]
    }


def meaning(name: str, known: Iterable[str], homes: Sequence[str] = ()) -> str:
    """Return a sentence, with a space before it, on what an unknown key may mean; or nothing.

    Args:
        name: the key.
        known: the keys that may stand in its place.
        homes: where else this package has a key of this name, such as "[balance]".

    >>> meaning("router_topk", ["router_top_k"])
    " Did you mean 'router_top_k'?"
    >>> meaning("--moe-router-topk", ["num_experts"])
    " Megatron-Core's moe_router_topk is router_top_k here; see docs/guides/moving.md."
    """
    known, foreign = list(known), _rows()
    near = _nearest(name, foreign)
    if homes and near != _plain(name):
        return f" It belongs {' or '.join(homes)}."
    own = _nearest(name, known)
    if not near or (own and _likeness(name, own) >= _likeness(name, near)):
        return did_you_mean(name, known)
    # Each meaning once, in the words of the first project that has it.
    said: dict[tuple[str, str], str] = {}
    for row in foreign[near]:
        said.setdefault((row.ours, row.factor), str(row))
    # The default scope here is one that most others do not have.
    scope = ", also for its scope" if any(row.is_coefficient for row in foreign[near]) else ""
    return f" {'; '.join(said.values())}; see {_PAGE}{scope}."


@cache
def _rows() -> dict[str, list[ForeignKey]]:
    """Return the rows by key, without those that are called the same here."""
    rows: dict[str, list[ForeignKey]] = {}
    for each in projects().values():
        for row in each.keys:
            if row.key != row.ours:
                rows.setdefault(row.key, []).append(row)
    return rows


def _nearest(name: str, keys: Iterable[str]) -> str:
    near = difflib.get_close_matches(_plain(name), list(keys), n=1, cutoff=_CUTOFF)
    return near[0] if near else ""


def _likeness(name: str, key: str) -> float:
    return difflib.SequenceMatcher(None, key, _plain(name)).ratio()


def _plain(name: str) -> str:
    """Return a flag as a key: --moe-router-topk is moe_router_topk."""
    return name.lower().lstrip("-").replace("-", "_")
