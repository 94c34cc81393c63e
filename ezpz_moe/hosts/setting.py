"""One setting of a trainer's config, whichever the host, and nested configs as flat paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the trainer's config.

    Attributes:
        path: ``section.name``, which is also the trainer's flag ``--section.name``.
        default: the host's own value; None also where the host has no such field by default.
    """

    path: str
    value: Any
    default: Any

    @property
    def changed(self) -> bool:
        return self.value != self.default


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """``("a.b", value)`` of everything in nested dicts and lists of dicts."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(node, Mapping):
        children = node.items()
    elif isinstance(node, list | tuple) and any(isinstance(item, Mapping) for item in node):
        children = enumerate(node)
    else:
        yield path, node
        return
    for name, child in children:
        yield from flat(child, f"{path}.{name}" if path else str(name))
