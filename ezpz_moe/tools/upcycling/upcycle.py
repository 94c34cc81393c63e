"""Write the checkpoint of an upcycled model, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ezpz_moe.config.layer_sizes import one_or_each
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.upcycling_target import PARTS, Layer, Target
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint
from ezpz_moe.tools.upcycling import weights
from ezpz_moe.tools.upcycling.dense import Dense, check_left_over
from ezpz_moe.tools.upcycling.fit import Fit, check_routing, fit
from ezpz_moe.tools.upcycling.weights import Perturbation

Make = Callable[[], torch.Tensor]
Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Upcycled:
    """What was done.

    Attributes:
        source: the checkpoint that was read.
        tensors: how many were written and compared.
        layers: how many got experts.
        num_experts: per layer; a tuple has each layer's number, where they differ.
        parts: into how many the dense FFN was split, each of them an expert; a tuple as above.
        is_preserved: whether the model computes the dense model's function, apart from rounding.
        notes: what the user should know, one sentence each.
    """

    source: Path
    tensors: int
    layers: int
    num_experts: int | tuple[int, ...]
    parts: int | tuple[int, ...]
    is_preserved: bool
    notes: tuple[str, ...]


def upcycle(
    dense: Dense,
    target: Target,
    out: Path,
    perturbation: Perturbation,
    *,
    progress: Progress = iter,
) -> Upcycled:
    """Write the dense model as the flavor's, as a DCP checkpoint of the model alone.

    Every tensor is computed again after writing and compared with what was written. Memory holds
    one dense tensor and twice the largest tensor of experts.

    Raises:
        EzpzError: the two models do not fit, with the tensors' names; what was written differs; and
        as :func:`~ezpz_moe.tools.checkpoints.folder.atomic_folder`.
    """
    # Check everything first: writing a large model takes long.
    check_routing(target.flavor)
    fits = {layer.name: _fit(dense, target, layer) for layer in target.layers}
    copied = _copied(dense, target)
    in_ffns = {name for layer in target.layers for name in layer.dense.values()}
    check_left_over(dense, in_ffns | copied, target.flavor.name)
    # Functions, not tensors: each tensor is made when it is written, and once more to compare.
    make: dict[str, Make] = {name: partial(dense.read, name) for name in copied}
    for layer in target.layers:
        make |= _made(dense, target, layer, fits[layer.name], perturbation)
    order = list(target.tensors)
    # More than is written if the dense model has several dtypes: the check of the disk errs on the
    # safe side.
    needed = dense.itemsize * sum(math.prod(each.shape) for each in target.tensors.values())
    with atomic_folder(out, source=dense.folder, needed=needed) as folder:
        written = write_checkpoint(folder, ((name, make[name]()) for name in progress(order)))
        for name in progress(order):
            # Computing the tensor again is cheaper than keeping all of them in memory.
            check_same(folder, dense.folder, name, read_whole(folder, written, name), make[name]())
    first = target.layers[0]
    return Upcycled(
        source=dense.folder,
        tensors=len(order),
        layers=len(target.layers),
        num_experts=one_or_each([layer.num_experts for layer in target.layers]),
        parts=one_or_each([each.granularity for each in fits.values()]),
        # Without normalized weights the sum depends on the token: fit() is exact only for equal
        # scores.
        is_preserved=first.route_norm and perturbation.is_none,
        notes=(*_notes_of(target, fits, perturbation), *dense.notes),
    )


def _fit(dense: Dense, target: Target, layer: Layer) -> Fit:
    shapes = {part: dense.shape(name) for part, name in layer.dense.items()}
    found = {part: shape for part, shape in shapes.items() if shape is not None}
    if missing := [layer.dense[part] for part in PARTS if part not in found]:
        raise EzpzError(
            f"{dense.folder}: has no {missing[0]}, which flavor {target.flavor.name} needs to make "
            f"{layer.experts[PARTS[0]]}. Is the flavor of the same family, with the same number of "
            "layers?"
        )
    return fit(target, layer, found, dense.folder)


def _copied(dense: Dense, target: Target) -> set[str]:
    """Return the names of what is copied unchanged."""
    new = {name for layer in target.layers for name in _new_names(layer)}
    copied = {name: each for name, each in target.tensors.items() if name not in new}
    for name, tensor in copied.items():
        if (shape := dense.shape(name)) != tensor.shape:
            has = f"has no {name}" if shape is None else f"{name} is {list(shape)} there"
            raise EzpzError(
                f"{dense.folder}: {has}, but {name} of flavor {target.flavor.name} is "
                f"{list(tensor.shape)}. Is the model whole, and the flavor of the same family and "
                "sizes?"
            )
    return set(copied)


def _new_names(layer: Layer) -> Iterator[str]:
    """Yield what a layer has instead of the dense FFN."""
    yield from (*layer.experts.values(), *layer.shared.values(), layer.gate, *layer.zeros)


def _made(
    dense: Dense, target: Target, layer: Layer, fit: Fit, perturbation: Perturbation
) -> Mapping[str, Make]:
    """Return a function for each new tensor that makes it."""

    def experts(part: str) -> torch.Tensor:
        return weights.experts(
            dense.read(layer.dense[part]),
            layer.name,
            part,
            num_experts=layer.num_experts,
            granularity=fit.granularity,
            scale=fit.scale,
            perturbation=perturbation,
        )

    def shared(part: str) -> torch.Tensor:
        origin, shape = dense.read(layer.dense[part]), target.tensors[layer.shared[part]].shape
        # With w2 = 0 a shared expert adds nothing at step 0. w1 and w3 must not be zero as well, or
        # w2 would never get a gradient.
        if part == "w2":
            return torch.zeros(shape, dtype=origin.dtype)
        return weights.like(origin, shape, layer.name, part, seed=perturbation.seed)

    def router() -> torch.Tensor:
        shape = target.tensors[layer.gate].shape
        drawn = weights.router(
            shape, layer.name, granularity=fit.granularity, perturbation=perturbation
        )
        return drawn.to(dense.read(layer.dense["w1"]).dtype)

    def zeros(name: str) -> torch.Tensor:
        # The target's tensors are on the meta device: they have shapes and no memory.
        return torch.zeros_like(target.tensors[name], device="cpu")

    return {
        **{name: partial(experts, part) for part, name in layer.experts.items()},
        **{name: partial(shared, part) for part, name in layer.shared.items()},
        layer.gate: router,
        **{name: partial(zeros, name) for name in layer.zeros},
    }


def _notes_of(target: Target, fits: Mapping[str, Fit], perturbation: Perturbation) -> Iterator[str]:
    """Yield what the user should know, once for all layers that it is true of."""
    layers_of: dict[str, list[str]] = {}
    for layer in target.layers:
        for note in _notes(layer, fits[layer.name], perturbation):
            layers_of.setdefault(note, []).append(layer.name)
    for note, layers in layers_of.items():
        yield note if len(layers) == len(target.layers) else f"{', '.join(layers)}: {note}"


def _notes(layer: Layer, fit: Fit, perturbation: Perturbation) -> Iterator[str]:
    """Yield what the user should know about the function at step 0."""
    if fit.scale != 1:
        yield (
            f"w2 of the experts is multiplied by {fit.scale:.6g}, because the weights of a token's "
            f"{layer.top_k} experts sum to {fit.weight_sum * layer.route_scale:.6g}"
            + (f", and {fit.granularity} of them make one copy." if fit.granularity > 1 else ".")
        )
    if not layer.route_norm:
        most = "1" if layer.score_func == "softmax" else f"{layer.top_k}"
        yield (
            "The weights of a token's experts are not normalized: they sum to "
            f"{fit.weight_sum:.6g} if all scores are equal, and to up to {most} if the "
            "router prefers some; the experts' output is too large by the same factor. A smaller "
            "--router-std brings it closer; router_route_norm = true in the flavor makes it exact."
        )
    if layer.shared:
        yield (
            "Shared experts: w2 is zero, so they add nothing at step 0; w1 and w3 are drawn "
            "with the dense weights' mean and standard deviation."
        )
    if not perturbation.is_none:
        yield "The copies differ (--noise, --reinit), so the function differs from the dense one."
