"""Compute something beside what a device's current stream does.

Two streams of a device run what is queued in them at the same time, in no order but the one that
is asked for. So a side stream is safe under four conditions, which :class:`SideStream` holds:

- it waits for what made the input, and the current stream waits for it before the result is read;
- the allocator knows that a tensor of one stream is used by another, or it would give its memory
  away too early (``Tensor.record_stream``);
- autograd adds up parameters' gradients on the current stream. It does so on the stream on which a
  graph first named the parameter, and orders everything else itself: a backward operator runs on
  the stream of its forward. What reads gradients while backward runs, as FSDP does, waits for the
  current stream alone.
- the side work is queued first. Autograd begins with what was queued last, on the current stream;
  what a checkpoint recomputes there, tensors of the current stream are read from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor


class SideStream:
    """One more stream of a device.

    Args:
        of_device: the device's module, such as ``torch.cuda``: it has ``Stream``, ``stream`` and
            ``current_stream``.
    """

    def __init__(self, of_device: Any) -> None:
        self._device = of_device
        self._stream = of_device.Stream()

    def start(
        self,
        compute: Callable[[Tensor], Tensor],
        x: Tensor,
        parameters: Iterable[nn.Parameter] = (),
    ) -> Tensor:
        """Queue ``compute(x)`` and return its result, which nobody may read before :meth:`join`.

        Args:
            compute: of any input and output.
            x: made on the current stream.
            parameters: what ``compute`` reads beside its input.
        """
        # Held until compute's graph has them. They belong to the stream that is current here.
        named = [get_gradient_edge(each) for each in parameters if _has_gradient(each)]
        self._stream.wait_stream(self._device.current_stream())
        # Before it is computed: a checkpoint's recomputation ends in the middle of it.
        _local(x).record_stream(self._stream)
        with self._device.stream(self._stream):
            result = compute(x)
        del named
        return result

    def join(self, result: Tensor) -> Tensor:
        """Let the current stream wait for ``result``, and return it."""
        current = self._device.current_stream()
        current.wait_stream(self._stream)
        _local(result).record_stream(current)
        return result


def has_streams(device_type: str) -> bool:
    """Return whether work on such a device can be queued in more than one stream.

    A CPU has none: the module ``torch.cpu`` has the names, and they order nothing.
    """
    names = ("Stream", "stream", "current_stream")
    module = getattr(torch, device_type, None)
    return device_type != "cpu" and all(hasattr(module, name) for name in names)


@cache
def side_stream(device: torch.device) -> SideStream | None:
    """Return the device's side stream, the same for all who ask; None if it has no streams."""
    if not has_streams(device.type):
        return None
    return SideStream(torch.get_device_module(device))


def _has_gradient(parameter: nn.Parameter) -> bool:
    return torch.is_grad_enabled() and parameter.requires_grad


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
