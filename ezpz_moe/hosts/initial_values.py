"""The initial values of a model on several CPU ranks: those that one rank would draw.

On a CPU mesh torch draws a DTensor's random values shard by shard, and on every rank from a
generator with the same seed: all shards begin alike, and an expert has a twin on every other rank.
Under a pipeline the stages draw with seeds of their own.

Here every rank runs the host's own initialisation a second time, on the whole model as one rank
has it, with the generator that rank 0 began with, and keeps of every parameter the part that it
holds. So the values are one rank's by construction, whatever the initialisers are and however the
model is shared out. Of the whole model one parameter at a time has memory. Before that the host
initialises its own model as ever: buffers are the host's, and so is the generator's state
afterwards.

Nothing here imports the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ezpz_moe.errors import EzpzError

_CPU = torch.device("cpu")
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")

Initialize = Callable[[Any, torch.device | None], None]
"""The host's initialisation of a model; the device is where its buffers go, None: as they are."""


class WholeModel:
    """What one rank would initialise: a copy of a model from before it is shared out.

    The stages of a pipeline are copies of one model; they share this, and with it the generator's
    state, of which later stages of a rank would see what earlier ones have left.
    """

    def __init__(self, model: nn.Module):
        self._model = deepcopy(model)
        self._generator: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> WholeModel:
        return self

    def remember_generator(self) -> None:
        """Agree with all ranks on the state of rank 0's generator, before anything is drawn.

        Collective, the first time.
        """
        if self._generator is None:
            self._generator = torch.get_rng_state()
            dist.broadcast(self._generator, src=0)

    def give_values_to(self, model: nn.Module, initialize: Initialize) -> None:
        """Overwrite the parameters of ``model``, this rank's part, with those of one rank.

        Raises:
            EzpzError: a parameter is none of the whole model's, or an initialiser draws from a
                generator of its own.
        """
        assert self._generator is not None
        shards = {_plain(name): shard for name, shard in _all_parameters(model)}
        _refuse_unknown(shards, dict(_all_parameters(self._model)))
        kept: set[str] = set()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            while True:
                torch.set_rng_state(self._generator)
                replay = _Replay(_without_memory(self._model), shards, kept)
                try:
                    with replay:
                        initialize(self._model, _CPU)
                    break
                except _TouchedAgain as again:
                    kept.add(again.name)
            replay.finish()
        self._model.to("meta")  # the buffers too


def whole_model(model: nn.Module) -> WholeModel | None:
    """The copy of a model that has just been built, in a run of several ranks; otherwise None."""
    return WholeModel(model) if has_several_ranks() else None


def has_several_ranks() -> bool:
    """Whether this process is one of several; in a dry run the others are only pretended."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size() > 1 and dist.get_backend() != "fake"


def initialize_as_one_rank(
    model: nn.Module,
    whole: WholeModel | None,
    initialize: Initialize,
    buffer_device: torch.device | None,
) -> None:
    """Initialise this rank's part of a model, on a CPU with the values of a run on one rank.

    Elsewhere torch draws shards of DTensors as parts of one whole, and the host's values stay.

    Args:
        model: the part, with memory and without values.
        whole: the model that it is a part of; None: ``model`` itself is all there is.
        initialize: the host's initialisation, for the part and for the whole.
        buffer_device: where the host wants the part's buffers.

    Raises:
        EzpzError: as :meth:`WholeModel.give_values_to`.
    """
    if whole is None or not _is_on_cpu(model):
        initialize(model, buffer_device)
        return
    whole.remember_generator()
    initialize(model, buffer_device)
    whole.give_values_to(model, initialize)


class _TouchedAgain(Exception):
    """An initialiser came back to a parameter that had been given away."""

    def __init__(self, name: str):
        self.name = name


class _Replay(TorchDispatchMode):
    """While it is on, a parameter gets memory when it is touched, and loses it to the next one.

    When it loses it, its values go to the rank's shard. Those of ``kept`` stay until the end.
    """

    def __init__(
        self,
        parameters: Mapping[int, tuple[str, Tensor]],
        shards: Mapping[str, Tensor],
        kept: set[str],
    ):
        super().__init__()
        self._parameters = parameters
        self._shards = shards
        self._kept = kept
        self._open: dict[str, Tensor] = {}
        self._given: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._touch(tensor)
        if kwargs.get("generator") is not None:
            raise EzpzError(
                f"the initialiser of {' and '.join(self._open) or 'the model'} ({func}) draws from "
                "a generator of its own, so several CPU ranks cannot start with the values of "
                "a single rank. Draw from torch's default generator, or train with one rank."
            )
        return func(*args, **kwargs)

    def finish(self) -> None:
        """Give away what still has memory."""
        for name in list(self._open):
            self._give(name)

    def _touch(self, tensor: Tensor) -> None:
        name, parameter = self._parameters.get(_storage(tensor), ("", tensor))
        if not name or name in self._open:
            return
        if name in self._given:
            raise _TouchedAgain(name)
        for other in self._open.keys() - self._kept:
            self._give(other)
        parameter.untyped_storage().resize_(parameter.numel() * parameter.itemsize)
        self._open[name] = parameter

    def _give(self, name: str) -> None:
        whole = self._open.pop(name)
        self._given.add(name)
        if name in self._shards:
            copy_part(name, whole, self._shards[name])
        whole.untyped_storage().resize_(0)


def _without_memory(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Put ``model`` on the CPU, with buffers in memory and parameters without; those by storage.

    As with the host's ``to_empty``, parameters that are tied come apart: the host ties them again.
    """
    parameters = {}
    for prefix, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.empty_like(old, device=_CPU), requires_grad=old.requires_grad)
            new.untyped_storage().resize_(0)
            setattr(module, name, new)
            parameters[_storage(new)] = (f"{prefix}.{name}" if prefix else name, new.detach())
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=_CPU))
    return parameters


def _storage(tensor: Tensor) -> int:
    """Which storage a tensor has, also while that is empty."""
    return tensor.untyped_storage()._cdata


def copy_part(name: str, whole: Tensor, shard: Tensor) -> None:
    """Copy into a rank's shard what it holds of the whole tensor."""
    part, local = whole, shard
    if isinstance(shard, DTensor):
        local = shard.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(
            whole.shape, shard.device_mesh, shard.placements
        )
        for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
            # An empty shard lies beyond the end.
            part = part.narrow(dim, min(offset, part.shape[dim] - size), size)
    if part.shape != local.shape:
        raise EzpzError(
            f"parameter {name} {tuple(whole.shape)} has the shape {tuple(local.shape)} on this "
            f"rank, but nothing says which part of it that is, so several CPU ranks cannot "
            "start with the values of a single rank. Shard it as a DTensor, or train with one rank."
        )
    local.copy_(part)


def _refuse_unknown(shards: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    if unknown := shards.keys() - known.keys():
        raise EzpzError(
            f"parameters {', '.join(sorted(unknown))} were added after the model was built, so "
            "several CPU ranks cannot start with the values of a single rank. Train with one rank."
        )


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter: tied ones have several."""
    return model.named_parameters(remove_duplicate=False)


def _plain(name: str) -> str:
    """The name of a parameter without what wraps its modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_on_cpu(model: nn.Module) -> bool:
    return any(parameter.device.type == "cpu" for parameter in model.parameters())
