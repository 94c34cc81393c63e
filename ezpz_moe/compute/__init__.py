"""Expert kernels: pure tensor code that imports torch and never a trainer.

Several ways to compute the routed experts of a Mixture-of-Experts layer, with one signature::

    from ezpz_moe.compute import for_loop

    y_RD = for_loop(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)

Every file in :mod:`.backends` has such a function. :mod:`.contract` says what every backend
promises, :mod:`.registry` finds backends by name, and :mod:`.reference` is the float64 truth that
they are measured against.

Exports are imported when they are first used: reading a flavor needs the backends' names
(:mod:`.names`) and must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ezpz_moe.compute.names import own_backends

_EXPORTED = {
    "Backend": "ezpz_moe.compute.contract",
    "Biases": "ezpz_moe.compute.arguments",
    "backend_names": "ezpz_moe.compute.registry",
    "get_backend": "ezpz_moe.compute.registry",
}

__all__ = [*_EXPORTED, *own_backends()]


def __getattr__(name: str) -> Any:
    """An exported class or function, or a backend's ``ffn``."""
    if name in _EXPORTED:
        return getattr(import_module(_EXPORTED[name]), name)
    if name in own_backends():
        return import_module(own_backends()[name]).BACKEND.ffn
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
