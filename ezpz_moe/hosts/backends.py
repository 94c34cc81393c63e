"""Look up a flavor's backend, and word what a run says of it. For all hosts."""

from typing import TypeAlias

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.contract import Backend
from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError

ExpertComputeBackend: TypeAlias = str
"""Name of an installed backend; ``ezpz_moe.compute.backend_names()`` lists them."""

HOST_PATH: ExpertComputeBackend = "grouped_mm"
"""The backend that stands for the host's own code, unchanged."""


def backend_of(flavor: Flavor) -> Backend:
    """Return the backend that computes the flavor's experts.

    Raises:
        EzpzError: the backend does not load, or does not take these options. The message names
            the flavor's file.
    """
    # Only here do options meet their backend: a flavor's file is read without torch.
    try:
        return get_backend(flavor.compute_backend)
    except EzpzError as error:
        raise EzpzError(f"{flavor.source}: {error}") from error


def layer_in_words(compute_backend: str, why_composed: str | None) -> str:
    """Return the end of the line that a run logs about its backend.

    Args:
        compute_backend: name of the backend. Of the host's own path nothing is said.
        why_composed: why the host dispatches and combines; None if the backend does.
    """
    if compute_backend == HOST_PATH:
        return ""
    composed = f"composed: {why_composed}"
    return f"; routed layer {'as one node' if why_composed is None else composed}"


def drops_warning(compute_backend: str, reported: str) -> str:
    """Return the warning that a run logs once at the start.

    Args:
        compute_backend: name of the backend.
        reported: where this host reports the share, as the end of "Their share ...".
    """
    return (
        f"compute_backend {compute_backend} drops tokens beyond its capacity: for them, the "
        f"experts output zero. Their share {reported}."
    )
