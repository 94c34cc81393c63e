"""Route on the CPU, where ``torch.histc`` of int64, which torchtitan 0.2 calls, has no kernel.

The subclasses here compute what the host computes, with ``torch.bincount`` instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchtitan.models.moe import MoE
from torchtitan.models.moe.moe import TokenChoiceTopKRouter, TokenReorderer


class _IntegerHistogram(TorchFunctionMode):
    """Answers ``torch.histc`` of integers from 0 to ``bins`` - 1, in their dtype."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # A function mode intercepts one call inside the host's forward, which need not be copied.
        if func is torch.histc:
            return _histogram(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _histogram(input: torch.Tensor, bins: int, min: int, max: int) -> torch.Tensor:
    # The host's bins are one integer wide, from 0 to `max` = `bins`; no index reaches `max`.
    assert (min, max) == (0, bins)
    return torch.bincount(input, minlength=bins).to(input.dtype)


class CpuRouter(TokenChoiceTopKRouter):
    """The host's router, with counts that the CPU can compute."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        with _IntegerHistogram():
            return super().forward(*args, **kwargs)


class CpuReorderer(TokenReorderer):
    """The host's reorderer, with counts that the CPU can compute."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        with _IntegerHistogram():
            return super().forward(*args, **kwargs)


def count_on_cpu(model: nn.Module) -> None:
    """Make every MoE layer of ``model`` route with the classes above, in place.

    Only the class of the modules changes, as FSDP does it: they keep everything they hold.
    """
    for moe in model.modules():
        if isinstance(moe, MoE):
            # The host has no door for a router's class, and a new module would need its parameters.
            moe.router.__class__ = CpuRouter
            moe.reorderer.__class__ = CpuReorderer
