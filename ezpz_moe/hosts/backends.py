"""A flavor's backend, and what a run says of one that drops tokens: the same on every host."""

from typing import TypeAlias

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.contract import Backend
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError

ExpertComputeBackend: TypeAlias = str
"""Name of an installed backend; ``ezpz_moe.compute.backend_names()`` lists them."""

HOST_PATH: ExpertComputeBackend = "grouped_mm"
"""The backend that is the host's own code, untouched."""


def backend_of(flavor: Flavor) -> Backend:
    """What computes the flavor's experts.

    Raises:
        EzpzError: the backend does not load, or takes no such options; names the flavor's file.
    """
    try:
        return get_backend(flavor.compute_backend)
    except EzpzError as error:
        raise EzpzError(f"{flavor.source}: {error}") from error


def drops_warning(compute_backend: str, reported: str) -> str:
    """For the log, once at the start.

    Args:
        reported: where this host says how many, as the end of "Their share ...".
    """
    return (
        f"compute_backend {compute_backend} drops tokens beyond its capacity: for them, the "
        f"experts output zero. Their share {reported}."
    )
