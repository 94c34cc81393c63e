"""Tell which of the host's token dispatchers can leave assignments out."""

from __future__ import annotations

from typing import Any

from ezpz_moe.config.routing_schema import Router

SORTING = ("LocalTokenDispatcher", "AllToAllTokenDispatcher")
"""Those that sort assignments, so that some can be cut off; others send a fixed number of them."""


def host_class(dispatcher: Any) -> str:
    """Return the name of the host's class that a dispatcher's config is made from."""
    # The dispatcher may already be a subclass of ours, with a name that nobody wrote in a job.
    classes = type(dispatcher)._owner.mro()
    return next(each.__name__ for each in classes if each.__module__.startswith("torchtitan."))


def cuts_padding(dispatcher: Any, settings: Router) -> bool:
    """Return whether padding goes to no expert: asked for, or possible and not asked against."""
    if not settings.masks_padding or settings.dispatch_padding is True:
        return False
    return settings.dispatch_padding is False or host_class(dispatcher) in SORTING
