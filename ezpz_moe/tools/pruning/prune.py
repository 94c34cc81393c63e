"""Write the checkpoint of a model with fewer experts, one tensor at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import Job
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.analysis.record import Recording
from ezpz_moe.tools.checkpoints import contents
from ezpz_moe.tools.checkpoints.expert_rows import is_stack
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint
from ezpz_moe.tools.pruning import merging
from ezpz_moe.tools.pruning.constants import Constant
from ezpz_moe.tools.pruning.effects import changes
from ezpz_moe.tools.pruning.layers import Layer, Measure, decide
from ezpz_moe.tools.pruning.settings import write_flavor, write_job
from ezpz_moe.tools.pruning.whole import Whole

Progress = Callable[[list[str]], Iterable[str]]
MakeConstants = Callable[[Mapping[str, Sequence[int]]], Mapping[str, Sequence[Constant]]]

_CONSTANTS = "moe.routed_experts.constant_experts"
_MIX, _VECTORS = "mix_C2D", "vectors_CD"


@dataclass(frozen=True)
class Pruned:
    """What was done.

    Attributes:
        flavor: the smaller model's, in the folder that was written.
        tensors: how many were written and compared.
        layers: by name, such as "layers.3".
        notes: what the user should know, one sentence each.
    """

    flavor: Flavor
    tensors: int
    layers: Mapping[str, Layer]
    notes: tuple[str, ...]


def prune(
    whole: Whole,
    job: Job,
    out: Path,
    *,
    keep: int,
    by: Measure,
    merge: bool = False,
    make_constants: MakeConstants | None = None,
    recording: Recording | None = None,
    progress: Progress = iter,
) -> Pruned:
    """Write a model with ``keep`` experts in a layer as a checkpoint, with its flavor and a job.

    Every tensor is computed again after writing and compared with what was written. Memory holds a
    tensor of all experts and one of those that stay; with ``merge``, twice that and an [F, F] for
    each expert that goes.

    Args:
        whole: the model, of which :func:`check` has nothing to say.
        job: what trains it.
        out: the folder to write.
        by: what decides which experts stay.
        merge: whether to add those that go to those that stay.
        make_constants: makes constant experts for those that go, by layer; None: they are gone.
        recording: what the model does with a text; needed unless ``by`` is "cosine".

    Raises:
        EzpzError: what was written differs; and as
            :func:`~ezpz_moe.tools.checkpoints.folder.atomic_folder`.
    """
    layers = {
        name: decide(whole, name, keep, by, merge, recording) for name in whole.rows.num_experts
    }
    if make_constants is not None:
        made = make_constants({name: of.removed for name, of in layers.items()})
        layers = {
            name: dataclasses.replace(of, constants=tuple(made[name]))
            for name, of in layers.items()
        }
    choices = {name: router.top_k for name, router in whole.routers.items()}
    new = next(len(of.constants) for of in layers.values())
    order = [*dict.fromkeys([*whole.sizes, *(_new_names(layers) if new else ())])]
    make = partial(_made, whole, layers)
    # Without the experts that go, it is less.
    needed = sum(math.prod(size) for size in whole.sizes.values()) * whole.itemsize
    with atomic_folder(out, source=whole.folder, needed=needed) as folder:
        flavor = write_flavor(whole.flavor, folder, keep=keep, choices=choices, constants=new)
        write_job(job, flavor, folder, out)
        _check_sizes(whole, layers, flavor, order)
        written = write_checkpoint(folder, ((name, make(name)) for name in progress(order)))
        for name in progress(order):
            # Computing the tensor again is cheaper than keeping all of them in memory.
            check_same(folder, whole.folder, name, read_whole(folder, written, name), make(name))
    return Pruned(flavor, len(order), layers, tuple(_notes(whole, job, keep, layers)))


def _made(whole: Whole, layers: Mapping[str, Layer], name: str) -> torch.Tensor:
    """Return a tensor of the smaller model."""
    layer, _, part = name.partition(f".{_CONSTANTS}.")
    if part and layers[layer].constants:
        made = layers[layer].constants
        new = torch.stack([each.mix_2D if part == _MIX else each.vector_D for each in made])
        own = whole.read(name) if name in whole.sizes else new[:0].float()
        return torch.cat([own, new.to(own.dtype)])
    tensor = whole.read(name)
    if is_stack(name):
        (place,) = whole.rows.dims[name]
        tensor = merging.merge(tensor, name, layers[place.layer].merged)
    return _rows(whole, layers, name, tensor)


def _rows(
    whole: Whole, layers: Mapping[str, Layer], name: str, tensor: torch.Tensor
) -> torch.Tensor:
    """Return what the smaller model has of a tensor."""
    kept = {each: of.kept for each, of in layers.items()}
    behind = {each: of.removed for each, of in layers.items() if of.constants}
    return whole.rows.take(name, tensor, kept, behind)


def _new_names(layers: Mapping[str, Layer]) -> Iterator[str]:
    for name in layers:
        yield from (f"{name}.{_CONSTANTS}.{part}" for part in (_MIX, _VECTORS))


def _check_sizes(
    whole: Whole, layers: Mapping[str, Layer], flavor: Flavor, order: Sequence[str]
) -> None:
    """Check that the smaller flavor's model has what will be written, without reading it."""
    model = host().build_on_meta(flavor).state_dict()
    sizes = {
        name: _rows(whole, layers, name, torch.empty(whole.sizes[name], device="meta")).shape
        for name in order
        if _CONSTANTS not in name
    }
    # Those are made to fit, and written beside what was there.
    sizes |= {name: model[name].shape for name in order if _CONSTANTS in name and name in model}
    contents.check_model(whole.folder, sizes, model)


def _notes(whole: Whole, job: Job, keep: int, layers: Mapping[str, Layer]) -> Iterator[str]:
    """Yield what the user should know."""
    routers = list(whole.routers.values())
    biases = (name for name in whole.sizes if name.rpartition(".")[2].startswith("expert_bias"))
    has_bias = any(bool(whole.read(name).any()) for name in biases)
    is_same = any(of.constants for of in layers.values())  # then no choice is gone
    is_merged = any(of.merged for of in layers.values())
    found = changes(whole.flavor, routers[0], has_bias=has_bias, is_merged=is_merged)
    reasons = "" if is_same else "; ".join(found)
    if all(of.tokens == 0 for of in layers.values()):
        same = f"change: {reasons}" if reasons else "stay as they were, apart from rounding"
        yield f"No token of the text chose an expert that is gone. Its logits {same}."
    elif reasons:
        yield f"Tokens that chose no expert that is gone have other logits too: {reasons}."
    if is_same:
        yield (
            "Routers choose as before. No class of transformers has constant experts, so this "
            "model cannot be exported."
        )
    yield from _of_constants(layers)
    ranks = job.values.get("parallelism.expert_parallel_degree", 1)
    if isinstance(ranks, int) and ranks > 1 and keep % ranks:
        yield (
            f"{job.source}: parallelism.expert_parallel_degree = {ranks} does not divide {keep}. "
            "Change it before the next run."
        )


def _of_constants(layers: Mapping[str, Layer]) -> Iterator[str]:
    """Yield where constant experts are no replacement."""
    worse = [name.rpartition(".")[2] for name, of in layers.items() if (of.reproduced or 0) < 0]
    if worse:
        yield (
            f"The constant experts of layer {', '.join(worse)} are farther from what the removed "
            "ones gave than zero is, because they output some of the token itself. Train the "
            "model on before you use it, or leave out --as-constant."
        )
