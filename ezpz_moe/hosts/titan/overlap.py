"""Shared experts beside the routed ones: ``overlap_shared_experts = true``.

The host computes routed experts, then shared ones, and adds both up. Most of the first is waiting
for other ranks, and the shared experts need nothing of it. So they are started before, on the
device's side stream, and the host gets the result where it would have computed it:

    start shared(x)  |  router(x), routed(x)  |  routed + what was started

Nobody copies the host's layer: it calls the FFN as ever, which then returns what is there. Without
streams, as on a CPU, nothing is started and everything is the host's.

Legend of the suffixes: X = whatever is before the last dimension, D = model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import MoE
from torchtitan.protocols.module import Module

from ezpz_moe.compute.side_stream import SideStream, side_stream
from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.mixed import mixed, named_after


class Started(Module):
    """Mixin before a shared FFN: within :meth:`started` its result is there before the call."""

    _await: Callable[[], Tensor] | None = None

    @contextmanager
    def started(self, x: Tensor, side: SideStream) -> Iterator[None]:
        """Compute on another stream what the next call returns.

        Args:
            x: what that call has as its input.
            side: where.
        """
        # `forward`, and not the module: its hooks are for the host's call.
        result = side.start(self.forward, x, self.parameters())
        self._await = partial(side.join, result)
        try:
            yield
        finally:  # a checkpoint ends its recomputation with an exception
            self._await = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self._await is None else self._await()


@cache
def _overlapping(host_class: type[MoE]) -> Any:
    """Return ``host_class`` whose shared experts are started first.

    Cached: layers of one class stay of one class.
    """

    class Overlapping(host_class):
        overlaps_shared_experts = True
        # Where a layer looks for a stream, for whoever has other devices than torch.
        side_stream: Callable[[torch.device], SideStream | None] = staticmethod(side_stream)

        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            pass

        # The host looks up the shardings of inputs by the names of its own parameters.
        @wraps(host_class.forward)
        def forward(self, x_XD: Tensor) -> Tensor:
            side = self.side_stream(x_XD.device)
            if side is None:
                return super().forward(x_XD)
            with self.shared_experts.started(x_XD, side):
                return super().forward(x_XD)

    return named_after(Overlapping, host_class)


def overlap_shared_experts(model: Any, flavor: Flavor) -> None:
    """Start the shared experts of every layer of a model's config first, in place.

    Raises:
        EzpzError: a layer has none.
    """
    nodes = list(model.traverse(MoE.Config))
    for _, moe, parent, attribute in nodes:
        if getattr(moe, "shared_experts", None) is None:
            raise EzpzError(
                f"{flavor.source}: overlap_shared_experts = true has no effect: the layers of this "
                "model have no shared experts. Remove it."
            )
        shared = mixed(type(moe.shared_experts)._owner, Started)
        layer = derive(
            moe,
            _overlapping(type(moe)._owner).Config,
            shared_experts=derive(moe.shared_experts, shared.Config),
        )
        setattr(parent, attribute, layer)
