"""Make subclasses of whatever class of the host a model's config names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@cache
def mixed(host_class: Any, mixin: type) -> Any:
    """Return ``host_class`` with ``mixin`` before it, and with a ``Config`` of its own."""

    # Cached above: layers of one class would otherwise get a new class each.
    class Mixed(mixin, host_class):
        # Its own Config, even without a new field: the host builds the class that a Config is
        # nested in.
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):
            pass

    return named_after(Mixed, host_class)


def is_ours(kind: type) -> bool:
    """Return whether a class is of this package."""
    return kind.__module__.startswith("ezpz_moe.")


def written_name(kind: type) -> str:
    """Return the name of a class without what this package puts before it, for messages.

    A user meets it in torchtitan, or has written it: EzpzGroupedExperts is neither.
    """
    return next(each.__name__ for each in kind.__mro__ if not is_ours(each))


def named_after(made: type, host_class: type) -> Any:
    """Name ``made`` like the host's class with Ezpz before it, for logs and printed models."""
    made.__name__ = made.__qualname__ = f"Ezpz{host_class.__name__}"
    return made
