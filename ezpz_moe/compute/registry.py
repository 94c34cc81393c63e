"""Backends by name. One door for ours and for those of other packages."""

from functools import cache

from ezpz_moe.backend_names import backend_entry_points, known_backend_names
from ezpz_moe.compute.contract import Backend
from ezpz_moe.errors import EzpzError, did_you_mean


def backend_names() -> list[str]:
    """The names of all installed backends, ours first."""
    return known_backend_names()


@cache
def get_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        EzpzError: no such backend, or the package that brings it does not load.
    """
    points = backend_entry_points()
    if name not in points:
        raise EzpzError(
            f"unknown compute_backend {name!r}. Known: {', '.join(points)}."
            f"{did_you_mean(name, points)}"
        )
    try:
        backend = points[name].load()
    except Exception as error:
        raise EzpzError(
            f"compute_backend {name!r} ({points[name].value}) cannot be loaded: "
            f"{type(error).__name__}: {error}. Mend or uninstall the package that brings it."
        ) from error
    if not isinstance(backend, Backend) or backend.name != name:
        raise EzpzError(
            f"compute_backend {name!r}: the entry point {points[name].value} has to be an "
            f"ezpz_moe.compute.Backend whose name is {name!r}, not {backend!r}."
        )
    return backend
