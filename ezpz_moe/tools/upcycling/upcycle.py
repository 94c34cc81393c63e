"""Write the checkpoint of an upcycled model, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ezpz_moe.config.layer_sizes import one_or_each
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.upcycling_target import PARTS, Layer, Target
from ezpz_moe.tools.checkpoints.folder import atomic_folder, refuse_overwriting
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint
from ezpz_moe.tools.upcycling import several, weights
from ezpz_moe.tools.upcycling.dense import Dense, check_left_over
from ezpz_moe.tools.upcycling.fit import Fit, check_routing, fit
from ezpz_moe.tools.upcycling.notes import notes_of_layers, notes_of_models
from ezpz_moe.tools.upcycling.weights import Perturbation

Make = Callable[[], torch.Tensor]
Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Upcycled:
    """What was done.

    Attributes:
        sources: the checkpoints that were read.
        tensors: how many were written and compared.
        layers: how many got experts.
        num_experts: per layer; a tuple has each layer's number, where they differ.
        parts: into how many the dense FFN was split, each of them an expert; a tuple as above.
        is_one: whether all sources are the same model, bit by bit.
        is_preserved: whether the model computes that model's function, apart from rounding.
        notes: what the user should know, one sentence each.
    """

    sources: tuple[Path, ...]
    tensors: int
    layers: int
    num_experts: int | tuple[int, ...]
    parts: int | tuple[int, ...]
    is_one: bool
    is_preserved: bool
    notes: tuple[str, ...]


def upcycle(
    models: Sequence[Dense],
    target: Target,
    out: Path,
    perturbation: Perturbation,
    *,
    progress: Progress = iter,
) -> Upcycled:
    """Write the dense model as the flavor's, as a DCP checkpoint of the model alone.

    Of several models, each gives experts in turn, and everything else is their mean. Every tensor
    is computed again after writing and compared with what was written. Memory holds a tensor of
    each model, twice one of them in float64, and twice the largest tensor of experts.

    Args:
        models: one dense model, or several of the same sizes.
        target: the flavor's model.
        out: the folder to write, which must not exist.
        perturbation: what makes copies differ.
        progress: wraps the names of what is written, and then of what is compared.

    Raises:
        EzpzError: the models do not fit each other or the flavor's, with the tensors' names; a
            model would be left out; what was written differs; and as
            :func:`~ezpz_moe.tools.checkpoints.folder.atomic_folder`.
    """
    # Check everything first: writing a large model takes long.
    check_routing(target.flavor)
    fits = {layer.name: _fit(models, target, layer) for layer in target.layers}
    in_ffns = [name for layer in target.layers for name in layer.dense.values()]
    copied = _copied(target)
    for dense in models:
        _check_copied(dense, target, copied)
        check_left_over(dense, {*in_ffns, *copied}, target.flavor.name)
    used = [*in_ffns, *copied]
    # Functions, not tensors: each tensor is made when it is written, and once more to compare.
    make: dict[str, Make] = {name: partial(several.read_mean, models, name) for name in copied}
    for layer in target.layers:
        make |= _made(models, target, layer, fits[layer.name], perturbation)
    _write(models, target, out, make, several.widest(models, used), progress)
    is_one = several.are_same(models, used)
    return Upcycled(
        sources=tuple(dense.folder for dense in models),
        tensors=len(make),
        layers=len(target.layers),
        num_experts=one_or_each([layer.num_experts for layer in target.layers]),
        parts=one_or_each([each.granularity for each in fits.values()]),
        is_one=is_one,
        # Without normalized weights the sum depends on the token: fit() is exact only for equal
        # scores.
        is_preserved=is_one and target.layers[0].route_norm and perturbation.is_none,
        notes=(
            *notes_of_layers(target, fits, perturbation, is_one=is_one),
            *notes_of_models(models, target, fits, used, copied, is_one=is_one),
        ),
    )


def _write(
    models: Sequence[Dense],
    target: Target,
    out: Path,
    make: Mapping[str, Make],
    itemsize: int,
    progress: Progress,
) -> None:
    """Write each tensor, and compare what is read back with what is made once more."""
    order = list(target.tensors)
    # More than is written if the dense models have several dtypes: the check of the disk errs on
    # the safe side.
    needed = itemsize * sum(math.prod(each.shape) for each in target.tensors.values())
    first, *others = (dense.folder for dense in models)
    for folder in others:
        refuse_overwriting(folder, out)
    with atomic_folder(out, source=first, needed=needed) as folder:
        written = write_checkpoint(folder, ((name, make[name]()) for name in progress(order)))
        for name in progress(order):
            # Computing the tensor again is cheaper than keeping all of them in memory.
            check_same(folder, first, name, read_whole(folder, written, name), make[name]())


def _fit(models: Sequence[Dense], target: Target, layer: Layer) -> Fit:
    """Return how the FFNs of all models become the experts of a layer."""
    first, *others = (_fit_of(dense, target, layer) for dense in models)
    for dense, each in zip(models[1:], others, strict=True):
        if each.granularity != first.granularity:
            name = layer.dense["w1"]
            raise EzpzError(
                f"{dense.folder}: {name} is {list(dense.shape(name) or ())}, but "
                f"{list(models[0].shape(name) or ())} in {models[0].folder}: dense models that "
                "become one must have the same sizes."
            )
    several.check_copies(
        models, first, layer.num_experts, f"{layer.name} of flavor {target.flavor.name}"
    )
    return first


def _fit_of(dense: Dense, target: Target, layer: Layer) -> Fit:
    shapes = {part: dense.shape(name) for part, name in layer.dense.items()}
    found = {part: shape for part, shape in shapes.items() if shape is not None}
    if missing := [layer.dense[part] for part in PARTS if part not in found]:
        raise EzpzError(
            f"{dense.folder}: has no {missing[0]}, which flavor {target.flavor.name} needs to make "
            f"{layer.experts[PARTS[0]]}. Is the flavor of the same family, with the same number of "
            "layers?"
        )
    return fit(target, layer, found, dense.folder)


def _copied(target: Target) -> list[str]:
    """Return the names of what is not experts: copied, or the mean of several models."""
    new = {name for layer in target.layers for name in _new_names(layer)}
    return [name for name in target.tensors if name not in new]


def _check_copied(dense: Dense, target: Target, names: Iterable[str]) -> None:
    for name in names:
        tensor = target.tensors[name]
        if (shape := dense.shape(name)) != tensor.shape:
            has = f"has no {name}" if shape is None else f"{name} is {list(shape)} there"
            raise EzpzError(
                f"{dense.folder}: {has}, but {name} of flavor {target.flavor.name} is "
                f"{list(tensor.shape)}. Is the model whole, and the flavor of the same family and "
                "sizes?"
            )


def _new_names(layer: Layer) -> Iterator[str]:
    """Yield what a layer has instead of the dense FFN."""
    yield from (*layer.experts.values(), *layer.shared.values(), layer.gate, *layer.zeros)


def _made(
    models: Sequence[Dense], target: Target, layer: Layer, fit: Fit, perturbation: Perturbation
) -> Mapping[str, Make]:
    """Return a function for each new tensor that makes it."""

    def experts(part: str) -> torch.Tensor:
        return weights.experts(
            several.read_each(models, layer.dense[part]),
            layer.name,
            part,
            num_experts=layer.num_experts,
            granularity=fit.granularity,
            scale=fit.scale,
            perturbation=perturbation,
        )

    def shared(part: str) -> torch.Tensor:
        name, shape = layer.dense[part], target.tensors[layer.shared[part]].shape
        # With w2 = 0 a shared expert adds nothing at step 0. w1 and w3 must not be zero as well, or
        # w2 would never get a gradient.
        if part == "w2":
            return torch.zeros(shape, dtype=several.common_dtype(models, name))
        origin = several.read_mean(models, name)
        return weights.like(origin, shape, layer.name, part, seed=perturbation.seed)

    def router() -> torch.Tensor:
        shape = target.tensors[layer.gate].shape
        drawn = weights.router(
            shape, layer.name, granularity=fit.granularity, perturbation=perturbation
        )
        return drawn.to(several.common_dtype(models, layer.dense["w1"]))

    def zeros(name: str) -> torch.Tensor:
        # The target's tensors are on the meta device: they have shapes and no memory.
        return torch.zeros_like(target.tensors[name], device="cpu")

    return {
        **{name: partial(experts, part) for part, name in layer.experts.items()},
        **{name: partial(shared, part) for part, name in layer.shared.items()},
        layer.gate: router,
        **{name: partial(zeros, name) for name in layer.zeros},
    }
