"""A trainer's config as flat lines ``path = value``, beside the host's defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torchtitan.trainer import Trainer


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


def settings(config: Trainer.Config) -> list[Setting]:
    """Every field of the trainer's config, the model left out, in the host's order."""
    defaults = dict(flat(Trainer.Config(model_spec=config.model_spec).to_dict()))
    ours = {field.name for field in dataclasses.fields(config)} - {
        field.name for field in dataclasses.fields(Trainer.Config)
    }
    values = {
        name: value
        for name, value in config.to_dict().items()
        if name != "model_spec" and name not in ours
    }
    return [Setting(path, value, defaults.get(path)) for path, value in flat(values)]


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
