"""The experts classes of the installed host, under one name.

>>> from ezpz_moe.experts import EzpzGroupedExperts, ExpertComputeBackend
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ezpz_moe.hosts.backends import ExpertComputeBackend

    EzpzGroupedExperts: Any

__all__ = ["ExpertComputeBackend", "EzpzGroupedExperts"]


def __getattr__(name: str) -> Any:
    """Import the host for whichever class is asked for, and not before."""
    if name == "EzpzGroupedExperts":
        from ezpz_moe.hosts.detect import host

        return host().experts_class()
    if name == "ExpertComputeBackend":
        from ezpz_moe.hosts.backends import ExpertComputeBackend

        return ExpertComputeBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
