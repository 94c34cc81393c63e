"""Find the config with which the host itself trains one of its models: what door 2 names."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

VISION = "vision_encoder"
"""The field of a model's config that has its vision encoder."""


def config_name(module: str, flavor: str) -> str | None:
    """Return the name after ``--config`` for a model of ``--module``, or None if none is alike.

    The host does not say which config has which model, but names them alike: qwen3/30B-A3B is
    trained by qwen3_30b_a3b.
    """
    named = [
        node.name
        for node in _nodes(module, "config_registry.py")
        if isinstance(node, ast.FunctionDef)
    ]
    alike = [name for name in named if letters(name).endswith(letters(flavor))]
    return min(alike, key=len, default=None)


def requires_images(module: str) -> bool:
    """Return whether a model of ``--module`` cannot be configured without a vision encoder."""
    fields = (node for node in _nodes(module, "model.py") if isinstance(node, ast.AnnAssign))
    return any(
        field.value is None and isinstance(field.target, ast.Name) and field.target.id == VISION
        for field in fields
    )


def optimizers(module: str, config: str) -> list[str]:
    """Return the names of the optimizers that a config of the host trains with.

    Empty if the configs need what is not installed, such as the libraries of a loader for images.
    """
    try:
        registry = importlib.import_module(f"torchtitan.models.{module}.config_registry")
    except ImportError:
        return []
    groups = getattr(registry, config)().optimizer.param_groups
    return list(dict.fromkeys(group.optimizer_name for group in groups))


def door_2(module: str, flavor: str, backend: str) -> str:
    """Return the arguments that train the host's own config of a model with a backend."""
    config = config_name(module, flavor) or "NAME"
    override = f"""'ezpz_moe.overrides.experts={{"compute_backend": "{backend}"}}'"""
    return f"`--module {module} --config {config} --override.imports {override}`"


def letters(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _nodes(module: str, file: str) -> Iterator[ast.AST]:
    """Yield what a file of a model consists of.

    The file is read and not imported, as it may need what is not installed.
    """
    spec = find_spec(f"torchtitan.models.{module}")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, file)
        if path.is_file():
            yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))
