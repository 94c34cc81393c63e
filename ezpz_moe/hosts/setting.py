"""Represent settings of a trainer's config, and flatten nested configs. For all hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the trainer's config.

    Attributes:
        path: ``section.name``, which is also the trainer's flag ``--section.name``.
        value: its value in this config.
        default: the host's own value; None if the host has no such field by default.
    """

    path: str
    value: Any
    default: Any

    @property
    def changed(self) -> bool:
        return self.value != self.default


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``("a.b", value)`` for everything in nested dicts and lists of dicts."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        children = node.items()
    # Only lists of dicts: a list of plain values, such as betas, is one setting.
    elif isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        children = enumerate(node)
    else:
        yield path, node
        return
    for name, child in children:
        yield from flat(child, f"{path}.{name}" if path else str(name))
