"""Which backends are installed: their names, without importing torch.

Every backend, our own included, is an entry point of the group ``ezpz_moe.backends``, so that a
third-party package adds one in its own ``pyproject.toml`` and nothing here changes.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ezpz_moe.errors import EzpzError

GROUP = "ezpz_moe.backends"


@cache
def backend_entry_points() -> dict[str, EntryPoint]:
    """Name -> entry point, our own backends first, each name once.

    Raises:
        EzpzError: two packages register the same name, or our own are not registered.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=_ours_first):
        known = found.setdefault(point.name, point)
        if known.value != point.value:
            raise EzpzError(
                f"expert backend {point.name!r} is registered twice: {_origin(known)} and "
                f"{_origin(point)}. Uninstall one of the two packages."
            )
    if not found:
        raise EzpzError(
            "no expert backend is registered, so ezpz_moe is importable but not installed. "
            "Install it: pip install -e <checkout>, or pip install ezpz_moe."
        )
    return found


def known_backend_names() -> list[str]:
    """The names that ``compute_backend`` may take."""
    return list(backend_entry_points())


def _ours_first(point: EntryPoint) -> bool:
    return not point.value.startswith("ezpz_moe.")


def _origin(point: EntryPoint) -> str:
    package = point.dist.name if point.dist else "an unknown package"
    return f"{point.value} (of {package})"
