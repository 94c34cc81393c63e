"""What ``compute_backend`` may say: the installed backends' names, and how to write options.

This module does not import torch.

Our own backends are the files in ``backends/``. Other packages add one with an entry point in the
group ``ezpz_moe.backends`` of their ``pyproject.toml``.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ezpz_moe.errors import EzpzError, did_you_mean, short

GROUP = "ezpz_moe.backends"


@cache
def own_backends() -> dict[str, str]:
    """Map name -> module, for the backends in this package."""
    # List the files instead of importing them: this must work without torch.
    folder = Path(__file__).with_name("backends")
    return {each.name: f"{__package__}.backends.{each.name}" for each in iter_modules([folder])}


@cache
def backend_entry_points() -> dict[str, EntryPoint]:
    """Map name -> where to load it from: our own backends, then those of other packages.

    Raises:
        EzpzError: two packages register the same name, or one registers a name of ours.
    """
    found = {
        name: EntryPoint(name, f"{module}:BACKEND", GROUP)
        for name, module in own_backends().items()
    }
    for point in entry_points(group=GROUP):
        # An installation may list the same entry point twice; only different targets conflict.
        known = found.setdefault(point.name, point)
        if known.value != point.value:
            raise EzpzError(
                f"expert backend {point.name!r} is registered twice: {_origin(known)} and "
                f"{_origin(point)}. Uninstall one of the two packages."
            )
    return found


def known_backend_names() -> list[str]:
    """Return the names that ``compute_backend`` accepts."""
    return list(backend_entry_points())


def name_and_options(compute_backend: str) -> tuple[str, dict[str, Any]]:
    """Split ``"for_loop(recompute=true)"`` into ``("for_loop", {"recompute": True})``.

    The name has to be installed; only the backend can tell whether it has such options.

    Raises:
        EzpzError: an unknown name; neither ``name`` nor ``name(option=value, ...)``; an option
        given twice; a value that is not a number, string or boolean.
    """
    name, bracket, _ = compute_backend.partition("(")
    known = known_backend_names()
    if name not in known:
        said = short(name or compute_backend)
        raise EzpzError(
            f"unknown compute_backend {said!r}. Known: {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )
    if not bracket:
        return name, {}
    try:
        # Options look like a Python call, so Python's parser reads them. Nothing is evaluated.
        call = ast.parse(compute_backend, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        options = {str(each.arg): _value(each.value) for each in call.keywords if each.arg}
        if len(options) < len(call.keywords):  # one twice, or ** in front of it
            raise ValueError
        return name, options
    except (SyntaxError, TypeError, ValueError):
        raise EzpzError(
            f"compute_backend {short(compute_backend)!r}: write options as "
            f"{name}(option=value, other=value), each once, with values that are numbers, true or "
            f"false, or quoted strings."
        ) from None


def _value(node: ast.expr) -> Any:
    """Return a number, string or boolean, including ``true`` and ``false`` as TOML writes them."""
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    value = ast.literal_eval(node)
    if not isinstance(value, bool | int | float | str):
        raise TypeError
    return value


def _origin(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else "ezpz_moe"
    return f"{point.value} (of {package})"
