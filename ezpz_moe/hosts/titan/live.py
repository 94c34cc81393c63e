"""Count by component what a forward leaves in memory for backward, without computing anything.

Every operator's results are watched. A storage that still lives when backward would begin was
saved by autograd or cached by selective activation checkpointing. Hooks on saved tensors alone
would miss the latter. This also works with tensors that have no values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Place = tuple[str, str]
"""A part of the model ("layers.3", "norm"), and the component in it."""

_OUTSIDE: Place = ("", "other")


class LiveStorages(TorchDispatchMode):
    """Remembers each storage that an operator makes, and where in the model that was.

    Args:
        places: where each module is; a module that is not in it counts as where its parent is.
    """

    def __init__(self, places: Mapping[nn.Module, Place]) -> None:
        super().__init__()
        self._places = places
        self._where = [_OUTSIDE]
        self._made: dict[StorageWeakRef, Place] = {}  # a weak reference keeps the address taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(storage) for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            reference = StorageWeakRef(storage)
            # A view or an in-place result shares the storage of an input. Only new storages count,
            # at the place that made them.
            if reference not in given:
                self._made.setdefault(reference, self._where[-1])
        return result

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the operators, and track which module's forward is running."""
        hooks = [
            register_module_forward_pre_hook(self._enter),
            # always_call: after an error in a forward too, or its place would stay on the stack.
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def live_bytes(self, model: nn.Module) -> dict[Place, int]:
        """Return live bytes by where they were made, without the gathered weights of ``model``."""
        weights = {StorageWeakRef(each) for each in _storages(list(model.parameters()))}
        live: Counter[Place] = Counter()
        # FSDP's gathered weights are made inside forward, but `weights` reports them already.
        for reference, place in self._made.items():
            if reference not in weights and not reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
                live[place] += storage.nbytes()
        return {place: number for place, number in live.items() if number}

    def _enter(self, module: nn.Module, _: Any) -> None:
        # A wrapper or a model's private helper has no place of its own: it belongs to its parent.
        self._where.append(self._places.get(module, self._where[-1]))

    def _leave(self, *_: Any) -> None:
        self._where.pop()


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if not isinstance(value, torch.Tensor):
            continue
        if is_traceable_wrapper_subclass(value):  # a DTensor: what it holds on this rank
            inner, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in inner])
        elif value.layout is torch.strided:
            yield value.untyped_storage()
