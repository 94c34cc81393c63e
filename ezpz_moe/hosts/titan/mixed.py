"""Subclasses of whatever class of the host a model's config names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@cache
def mixed(host_class: Any, mixin: type) -> Any:
    """``host_class`` with ``mixin`` before it, and with a ``Config`` of its own."""

    class Mixed(mixin, host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):
            pass

    return named_after(Mixed, host_class)


def named_after(made: type, host_class: type) -> Any:
    """``made``, which the log and a printed model call by the host's name with Ezpz before it."""
    made.__name__ = made.__qualname__ = f"Ezpz{host_class.__name__}"
    return made
