"""Find the config with which the host itself trains one of its models: what door 2 names."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any


def config_name(module: str, flavor: str) -> str | None:
    """Return the name after ``--config`` for a model of ``--module``, or None if none is alike.

    The host does not say which config has which model, but names them alike: qwen3/30B-A3B is
    trained by qwen3_30b_a3b. None too if the configs need what is not installed, such as the
    libraries of a loader for images.
    """
    try:
        registry = _registry(module)
    except ImportError:
        return None
    named = [name for name, _ in inspect.getmembers(registry, inspect.isfunction)]
    alike = [name for name in named if letters(name).endswith(letters(flavor))]
    return min(alike, key=len, default=None)


def optimizers(module: str, config: str) -> list[str]:
    """Return the names of the optimizers that a config of the host trains with."""
    groups = getattr(_registry(module), config)().optimizer.param_groups
    return list(dict.fromkeys(group.optimizer_name for group in groups))


def door_2(module: str, flavor: str, backend: str) -> str:
    """Return the arguments that train the host's own config of a model with a backend."""
    config = config_name(module, flavor) or "NAME"
    override = f"""'ezpz_moe.overrides.experts={{"compute_backend": "{backend}"}}'"""
    return f"`--module {module} --config {config} --override.imports {override}`"


def letters(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub("[^a-z0-9]", "", name.lower())


def _registry(module: str) -> Any:
    return importlib.import_module(f"torchtitan.models.{module}.config_registry")
