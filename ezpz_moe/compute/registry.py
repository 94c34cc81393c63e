"""Find backends by name, both ours and those of other packages."""

import dataclasses
import json
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ezpz_moe.compute.contract import Backend
from ezpz_moe.compute.names import backend_entry_points, known_backend_names, name_and_options
from ezpz_moe.errors import EzpzError, did_you_mean


def backend_names() -> list[str]:
    """Return the names of all installed backends, ours first."""
    return known_backend_names()


@cache
def get_backend(compute_backend: str) -> Backend:
    """Return the backend ``"name"``, or ``"name(option=value, ...)"`` with its options set.

    Raises:
        EzpzError: there is no such backend or option, the option does not accept the value, or the
            backend's package does not load.
    """
    name, options = name_and_options(compute_backend)
    backend = _installed(name)
    return _with_options(backend, options, compute_backend) if options else backend


def options_of(backend: Backend) -> dict[str, Any]:
    """Return the backend's options, with their values."""
    return dataclasses.asdict(backend) if dataclasses.is_dataclass(backend) else {}


def _installed(name: str) -> Backend:
    point = backend_entry_points()[name]
    try:
        backend = point.load()
    # Anything: importing somebody else's package can raise whatever it likes.
    except Exception as error:
        raise EzpzError(
            f"compute_backend {name!r} ({point.value}) cannot be loaded: "
            f"{type(error).__name__}: {error}. Repair or uninstall the package that provides it."
        ) from error
    if not isinstance(backend, Backend) or backend.name != name:
        raise EzpzError(
            f"compute_backend {name!r}: the entry point {point.value} must be an "
            f"ezpz_moe.compute.Backend whose name is {name!r}, not {backend!r}."
        )
    return backend


def _with_options(backend: Backend, options: dict[str, Any], compute_backend: str) -> Backend:
    """Return the same backend with these options, which must have the declared types and ranges."""
    known = list(options_of(backend))
    for option in options:
        if option not in known:
            raise EzpzError(
                f"compute_backend {compute_backend!r}: {backend.name} has no option {option!r}. "
                f"Its options: {', '.join(known) or 'none'}.{did_you_mean(option, known)}"
            )
    try:
        # Via JSON: in strict mode, Python values would already have to be instances of the types.
        return TypeAdapter(type(backend)).validate_json(json.dumps(options), strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise EzpzError(
            f"compute_backend {compute_backend!r}: {wrong['loc'][0]} = {wrong['input']!r}: "
            f"{wrong['msg']}."
        ) from error
