"""A device of two streams, in place of one that no CPU is: it tells what nothing has ordered.

Operators run at once, as on any CPU. What a stream knows to be done before what is queued next is a
clock, which waiting for another stream moves on. An operator that reads what another stream has
made, and may not have made yet, is a race; so is memory of one stream that another reads without
having told the allocator.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self, name: str = "side") -> None:
        self.name = name
        self.done = {self: 0}
        """Stream -> how many of its operators end before the next of this one begins."""

    def wait_stream(self, other: "Stream") -> None:
        for stream, number in other.done.items():
            self.done[stream] = max(self.done.get(stream, 0), number)


class Device(TorchDispatchMode):
    """A module such as ``torch.cuda``; used as a context, it watches what is computed."""

    Stream = Stream

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main = self._current = Stream("main")
        self.operators: list[tuple[str, str]] = []
        """The stream and the name of each, in the order in which they were queued."""
        self.races: list[tuple[str, str]] = []
        self._owner: dict[int, Stream] = {}
        self._written: dict[int, tuple[Stream, int]] = {}
        self._read_by_another: set[tuple[int, Stream]] = set()
        self._recorded: set[tuple[int, Stream]] = set()
        self._alive: list[torch.Tensor] = []
        # A lambda, which becomes a method of the tensor's.
        record = lambda tensor, stream: self._recorded.add((_memory(tensor), stream))  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", record)

    def current_stream(self) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def unrecorded(self) -> set[tuple[int, Stream]]:
        """Memory that a stream reads, though it is another's and the allocator does not know."""
        return self._read_by_another - self._recorded

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        stream, name = self._current, operator.name()
        stream.done[stream] += 1
        self.operators.append((stream.name, name))
        read = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        for memory in read:
            if self._owner.get(memory, stream) is not stream:
                self._read_by_another.add((memory, stream))
            by, number = self._written.get(memory, (stream, 0))
            if stream.done.get(by, 0) < number:
                self.races.append((stream.name, name))
        result = operator(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            memory = _memory(tensor)
            if memory not in read:
                self._owner[memory] = stream
            if memory not in read or operator._schema.is_mutable:  # and not a view
                self._written[memory] = stream, stream.done[stream]
            self._alive.append(tensor)  # or another would get its memory
        return result


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
