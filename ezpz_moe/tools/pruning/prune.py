"""Write the checkpoint of a model with fewer experts, one tensor at a time.

Legend: E = routed experts of a layer, N = those that stay, Z = zero-computation experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.analysis.attribution import attribution
from ezpz_moe.tools.analysis.record import Recording
from ezpz_moe.tools.analysis.similarity import cosines
from ezpz_moe.tools.checkpoints import contents, storage
from ezpz_moe.tools.checkpoints.data_files import check_data
from ezpz_moe.tools.checkpoints.expert_rows import ExpertRows, expert_rows, is_stack
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint
from ezpz_moe.tools.pruning import merging
from ezpz_moe.tools.pruning.choice import least_alike, most_important
from ezpz_moe.tools.pruning.effects import changes
from ezpz_moe.tools.pruning.merging import Merged
from ezpz_moe.tools.pruning.settings import write_flavor, write_job

Measure = Literal["frequency", "weight", "cosine"]
Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Whole:
    """The model to make smaller.

    Attributes:
        folder: of its checkpoint.
        flavor: its flavor.
        sizes: of the model's tensors, by name.
        rows: where these count experts.
        routers: the host's, without values, by layer.
    """

    folder: Path
    flavor: Flavor
    sizes: Mapping[str, torch.Size]
    rows: ExpertRows
    routers: Mapping[str, Any]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor."""
        return read_whole(self.folder, storage.read_metadata(self.folder), name)

    def stacks(self, layer: str) -> list[str]:
        """Return the names of the tensors with a row for each routed expert of a layer."""
        return [name for name in self.sizes if is_stack(name) and self._is_of(name, layer)]

    def _is_of(self, name: str, layer: str) -> bool:
        return any(place.layer == layer for place in self.rows.dims[name])


@dataclass(frozen=True)
class Layer:
    """What becomes of a layer.

    Attributes:
        kept: numbers of the experts that stay, ascending.
        num_experts: how many there were, E.
        tokens: the share of a text's choices that the removed ones had; None without a text.
        weight: the same of the weights that routers gave.
        merged: removed experts that were added to others.
    """

    kept: tuple[int, ...]
    num_experts: int
    tokens: float | None
    weight: float | None
    merged: tuple[Merged, ...]


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


def open_whole(folder: Path, flavor: Flavor) -> Whole:
    """Read what a checkpoint holds, and compare it with its flavor's model.

    Raises:
        EzpzError: it is incomplete, of another generation or model, or has tensors that may belong
            to experts in a way that is not known.
    """
    metadata = storage.read_metadata(folder)
    check_data(folder, metadata)
    generation = host().checkpoint_names
    if (found := contents.generation(folder, metadata)) != generation:
        raise EzpzError(
            f"{folder}: has the names of torchtitan {found}. First run: ezpz-moe ckpt remap "
            f"{folder} DIR --to {generation}"
        )
    sizes = {name: entry.size for name, entry in contents.model_tensors(metadata)}
    model = host().build_on_meta(flavor)
    contents.check_model(folder, sizes, model.state_dict())
    return Whole(folder, flavor, sizes, expert_rows(sizes), host().analysis().routers(model))


def check(whole: Whole, keep: int) -> None:
    """Refuse a number of experts that the model cannot have, before anything is computed.

    Raises:
        EzpzError: says why.
    """
    flavor, most = whole.flavor, min(whole.rows.num_experts.values())
    if keep > most or keep >= max(whole.rows.num_experts.values()):
        raise EzpzError(
            f"--keep {keep}: a layer of flavor {flavor.name} has {most} experts. Keep fewer."
        )
    for router in whole.routers.values():
        limits_tokens = not flavor.router.has_unchosen and not flavor.router.leaves_out
        if limits_tokens and router.top_k > keep:
            raise EzpzError(
                f"--keep {keep}: a token of flavor {flavor.name} uses {router.top_k} experts. "
                "Keep at least as many."
            )
        if keep % (groups := router.num_expert_groups or 1):
            raise EzpzError(
                f"--keep {keep}: flavor {flavor.name} has its experts in {groups} groups of equal "
                f"size (router_num_expert_groups). Keep a multiple of {groups}."
            )


def prune(
    whole: Whole,
    job: Job,
    out: Path,
    *,
    keep: int,
    by: Measure,
    merge: bool,
    recording: Recording | None,
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
        recording: what the model does with a text; needed unless ``by`` is "cosine".

    Raises:
        EzpzError: what was written differs; and as
            :func:`~ezpz_moe.tools.checkpoints.folder.atomic_folder`.
    """
    layers = {
        name: _layer(whole, name, keep, by, merge, recording) for name in whole.rows.num_experts
    }
    choices = {name: router.top_k for name, router in whole.routers.items()}
    make = partial(_made, whole, layers)
    # Without the experts that go, it is less.
    needed = sum(math.prod(size) for size in whole.sizes.values()) * _itemsize(whole)
    with atomic_folder(out, source=whole.folder, needed=needed) as folder:
        flavor = write_flavor(whole.flavor, folder, keep=keep, choices=choices)
        write_job(job, flavor, folder, out)
        _check_sizes(whole, layers, flavor)
        order = list(whole.sizes)
        written = write_checkpoint(folder, ((name, make(name)) for name in progress(order)))
        for name in progress(order):
            # Computing the tensor again is cheaper than keeping all of them in memory.
            check_same(folder, whole.folder, name, read_whole(folder, written, name), make(name))
    return Pruned(flavor, len(whole.sizes), layers, tuple(_notes(whole, job, keep, layers)))


def _layer(
    whole: Whole, name: str, keep: int, by: Measure, merge: bool, recording: Recording | None
) -> Layer:
    """Decide what becomes of a layer."""
    E, groups = whole.rows.num_experts[name], whole.routers[name].num_expert_groups or 1
    tokens_E = _shares(recording, name, "share_of_tokens", E) if recording else None
    weight_E = _shares(recording, name, "share_of_weight", E) if recording else None
    alike_EE = None
    if by == "cosine" or merge:
        alike_EE = cosines(whole.read(stack) for stack in whole.stacks(name))
    if by == "cosine":
        assert alike_EE is not None
        kept = least_alike(alike_EE, keep, groups)
    else:
        amounts_E = tokens_E if by == "frequency" else weight_E
        assert amounts_E is not None
        kept = most_important(amounts_E, keep, groups)
    merged: list[Merged] = []
    if merge:
        assert alike_EE is not None
        # Without a text all experts count the same.
        part_E = (weight_E if by == "weight" else tokens_E) or [1.0] * E
        merged = _with_orders(whole, name, merging.where_to(kept, alike_EE, part_E))
    gone = [e for e in range(E) if e not in set(kept)]
    return Layer(
        kept=tuple(kept),
        num_experts=E,
        tokens=tokens_E and sum(tokens_E[e] for e in gone),
        weight=weight_E and sum(weight_E[e] for e in gone),
        merged=tuple(merged),
    )


def _shares(recording: Recording, layer: str, what: str, experts: int) -> list[float]:
    """Return what each routed expert of a layer has of a text."""
    number = int(layer.rpartition(".")[2])
    found = [getattr(one, what) for one in attribution(recording) if one.layer == number]
    return found[:experts]  # behind them are those without computation


def _with_orders(whole: Whole, layer: str, pairs: Sequence[Merged]) -> list[Merged]:
    """Return the pairs with the orders of their channels, for which each stack is read once."""
    similar = [torch.zeros(()) for _ in pairs]
    for name in whole.stacks(layer):
        stack = {name: whole.read(name)}
        similar = [
            total + merging.similar_channels(stack, pair)
            for total, pair in zip(similar, pairs, strict=True)
        ]
    return [
        dataclasses.replace(pair, order=merging.greedy_order(of))
        for pair, of in zip(pairs, similar, strict=True)
    ]


def _made(whole: Whole, layers: Mapping[str, Layer], name: str) -> torch.Tensor:
    """Return a tensor of the smaller model."""
    tensor = whole.read(name)
    if is_stack(name):
        (place,) = whole.rows.dims[name]
        tensor = merging.merge(tensor, name, layers[place.layer].merged)
    return whole.rows.take(name, tensor, {each: of.kept for each, of in layers.items()})


def _itemsize(whole: Whole) -> int:
    metadata = storage.read_metadata(whole.folder)
    of = dict(contents.model_tensors(metadata)).values()
    return max(each.properties.dtype.itemsize for each in of)


def _check_sizes(whole: Whole, layers: Mapping[str, Layer], flavor: Flavor) -> None:
    """Check that the smaller flavor's model has what will be written, without reading it."""
    kept = {name: of.kept for name, of in layers.items()}
    sizes = {
        name: whole.rows.take(name, torch.empty(size, device="meta"), kept).shape
        for name, size in whole.sizes.items()
    }
    contents.check_model(whole.folder, sizes, host().build_on_meta(flavor).state_dict())


def _notes(whole: Whole, job: Job, keep: int, layers: Mapping[str, Layer]) -> Iterator[str]:
    """Yield what the user should know."""
    routers = list(whole.routers.values())
    biases = (name for name in whole.sizes if name.rpartition(".")[2].startswith("expert_bias"))
    has_bias = any(bool(whole.read(name).any()) for name in biases)
    reasons = "; ".join(changes(whole.flavor, routers[0], has_bias=has_bias))
    if all(of.tokens == 0 for of in layers.values()):
        same = f"change: {reasons}" if reasons else "stay as they were, apart from rounding"
        yield f"No token of the text chose an expert that is gone. Its logits {same}."
    elif reasons:
        yield f"Tokens that chose no expert that is gone have other logits too: {reasons}."
    ranks = job.values.get("parallelism.expert_parallel_degree", 1)
    if isinstance(ranks, int) and ranks > 1 and keep % ranks:
        yield (
            f"{job.source}: parallelism.expert_parallel_degree = {ranks} does not divide {keep}. "
            "Change it before the next run."
        )
