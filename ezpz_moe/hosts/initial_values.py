"""Give a model on several CPU ranks the initial values that a single rank would draw.

On a CPU mesh, torch draws a DTensor's random values shard by shard, on every rank from a generator
with the same seed. All shards start equal, and every expert has a twin on every other rank. Under
a pipeline, each stage draws with its own seed.

Here every rank runs the host's own initialisation a second time: on the whole model, as a single
rank has it, and with the generator state that rank 0 started with. Of each parameter it keeps the
part that it holds. The values are those of one rank by construction, whatever the initialisers do
and however the model is sharded. Only one parameter of the whole model has memory at a time. Before
that, the host initialises its own model as usual: buffers come from the host, and so does the
generator state afterwards.

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
# What activation checkpointing, torch.compile and FSDP insert into the name of a parameter.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")

Initialize = Callable[[Any, torch.device | None], None]
"""The host's initialisation of a model, and the device for its buffers (None: where they are)."""


class WholeModel:
    """A copy of a model from before it is sharded: what a single rank would initialise.

    The stages of a pipeline are copies of one model and share this object. They also share the
    generator state in it: a later stage on the same rank would see what earlier stages have left.
    """

    def __init__(self, model: nn.Module):
        # The caller builds the model on the meta device, so the copy costs no memory for weights.
        self._model = deepcopy(model)
        self._generator: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> WholeModel:
        # The host deep-copies the model for each pipeline stage. A copy of this object per stage
        # would record the generator again, after an earlier stage of the same rank has drawn from
        # it.
        return self

    def remember_generator(self) -> None:
        """Make all ranks agree on the state of rank 0's generator, before anything is drawn.

        Collective on the first call.
        """
        if self._generator is None:
            self._generator = torch.get_rng_state()
            dist.broadcast(self._generator, src=0)

    def give_values_to(self, model: nn.Module, initialize: Initialize) -> None:
        """Overwrite the parameters of ``model``, this rank's part, with those of one rank.

        Raises:
            EzpzError: a parameter is not in the whole model, or an initialiser draws from a
                generator of its own.
        """
        assert self._generator is not None
        shards = {_plain(name): shard for name, shard in _all_parameters(model)}
        _refuse_unknown(shards, dict(_all_parameters(self._model)))
        kept: set[str] = set()
        # fork_rng: training draws from this generator too, so it must end in the state that the
        # host's own initialisation left.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Retry with one more parameter kept, until no initialiser comes back to one that has
            # been given away. Which ones do so cannot be known without running them.
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
    """Return a copy of a newly built model in a run of several ranks; otherwise None."""
    return WholeModel(model) if has_several_ranks() else None


def has_several_ranks() -> bool:
    """Return whether this process is one of several; the ranks of a dry run do not count."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size() > 1 and dist.get_backend() != "fake"


def initialize_as_one_rank(
    model: nn.Module,
    whole: WholeModel | None,
    initialize: Initialize,
    buffer_device: torch.device | None,
) -> None:
    """Initialise this rank's part of a model; on a CPU, with the values of a run on one rank.

    On other devices the host's values stay: there torch draws DTensor shards as parts of one whole.

    Args:
        model: the part, with memory and without values.
        whole: the model that it is a part of; None if ``model`` is all there is.
        initialize: the host's initialisation, for the part and for the whole.
        buffer_device: where the host wants the part's buffers.

    Raises:
        EzpzError: as :meth:`WholeModel.give_values_to`.
    """
    if whole is None or not _is_on_cpu(model):
        initialize(model, buffer_device)
        return
    # In this order: the broadcast needs the generator as it is before anyone draws, and the host's
    # initialisation, which also sets the buffers, would overwrite parameters that ours has set.
    whole.remember_generator()
    initialize(model, buffer_device)
    whole.give_values_to(model, initialize)


class _TouchedAgain(Exception):
    """Raised when an initialiser comes back to a parameter that has been given away."""

    def __init__(self, name: str):
        self.name = name


class _Replay(TorchDispatchMode):
    """Gives a parameter memory when it is touched, and takes it away for the next one.

    When a parameter loses its memory, its values go to the rank's shard. Those in ``kept`` keep
    their memory until the end.
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
        # A dispatch mode sees every operator, whatever the initialiser calls. Memory has to be
        # there before the operator runs, so tensors are touched first.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._touch(tensor)
        # set_rng_state resets only torch's default generator. From this one, the second run would
        # draw other values than a single rank does.
        if kwargs.get("generator") is not None:
            raise EzpzError(
                f"the initialiser of {' and '.join(self._open) or 'the model'} ({func}) draws from "
                "a generator of its own, so several CPU ranks cannot start with the values of "
                "a single rank. Draw from torch's default generator, or train with one rank."
            )
        return func(*args, **kwargs)

    def finish(self) -> None:
        """Give away everything that still has memory."""
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
        # A parameter of another pipeline stage has no shard here. It is still drawn, because the
        # generator must advance as on one rank.
        if name in self._shards:
            copy_part(name, whole, self._shards[name])
        whole.untyped_storage().resize_(0)


def _without_memory(model: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """Move ``model`` to the CPU, buffers with memory, parameters without; return those by storage.

    Tied parameters come apart, as they do with the host's ``to_empty``: the host ties them again.
    """
    parameters = {}
    for prefix, module in model.named_modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(torch.empty_like(old, device=_CPU), requires_grad=old.requires_grad)
            # Resized to 0 and not on the meta device: an initialiser must see a CPU tensor that it
            # can fill, and the same storage object can get its memory later.
            new.untyped_storage().resize_(0)
            setattr(module, name, new)
            parameters[_storage(new)] = (f"{prefix}.{name}" if prefix else name, new.detach())
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=_CPU))
    return parameters


def _storage(tensor: Tensor) -> int:
    """Return which storage a tensor has; works while the storage is empty, unlike data_ptr()."""
    return tensor.untyped_storage()._cdata


def copy_part(name: str, whole: Tensor, shard: Tensor) -> None:
    """Copy into a rank's shard the part of the whole tensor that it holds."""
    part, local = whole, shard
    if isinstance(shard, DTensor):
        local = shard.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(
            whole.shape, shard.device_mesh, shard.placements
        )
        for dim, (size, offset) in enumerate(zip(sizes, offsets, strict=True)):
            # The offset of an empty shard lies beyond the end.
            part = part.narrow(dim, min(offset, part.shape[dim] - size), size)
    # Also reached by a plain tensor that was cut without DTensor: guessing which part it is would
    # give wrong values silently.
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
    """Return every name of every parameter; tied parameters have several."""
    return model.named_parameters(remove_duplicate=False)


def _plain(name: str) -> str:
    """Return the name of a parameter without the wrappers around its modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_on_cpu(model: nn.Module) -> bool:
    return any(parameter.device.type == "cpu" for parameter in model.parameters())
