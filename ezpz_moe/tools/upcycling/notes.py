"""What the user should know about an upcycled model, one sentence each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ezpz_moe.hosts.upcycling_target import Layer, Target
from ezpz_moe.tools.upcycling import several
from ezpz_moe.tools.upcycling.dense import Dense
from ezpz_moe.tools.upcycling.fit import Fit
from ezpz_moe.tools.upcycling.weights import Perturbation


def notes_of_layers(
    target: Target, fits: Mapping[str, Fit], perturbation: Perturbation, *, is_one: bool
) -> Iterator[str]:
    """Yield how the layers' function at step 0 follows from the dense one.

    Args:
        target: the model that was built.
        fits: by the layers' names.
        perturbation: what makes copies differ.
        is_one: whether there is one dense function, which the experts could compute exactly.
    """

    def notes(layer: Layer) -> Iterator[str]:
        fit = fits[layer.name]
        if fit.scale != 1:
            yield _scale(layer, fit)
        if not layer.route_norm:
            yield _unnormalized(layer, fit) + (_CLOSER if is_one else "")
        if layer.shared:
            yield _SHARED
        if is_one and not perturbation.is_none:
            yield _PERTURBED

    yield from _once(target, notes)


def notes_of_models(
    models: Sequence[Dense],
    target: Target,
    fits: Mapping[str, Fit],
    used: Sequence[str],
    copied: Sequence[str],
    *,
    is_one: bool,
) -> Iterator[str]:
    """Yield what is to be known about the dense models, and how several become one.

    Args:
        models: as named by the user.
        target: the model that was built.
        fits: by the layers' names.
        used: the names of all tensors that were read of a dense model.
        copied: those of them that are no FFN's.
        is_one: whether all models are the same, bit by bit.
    """
    if len(models) == 1:
        yield from models[0].notes
        return
    if is_one:
        yield "The dense models are the same, bit by bit."
    else:
        yield from _once(
            target,
            lambda layer: [several.origin_note(models, fits[layer.name], layer.num_experts)],
        )
        matrices = [name for name in copied if target.tensors[name].dim() > 1]
        yield several.distance_note(models, matrices)
    yield from several.dtype_notes(models, used)
    for dense in models:
        yield from (f"{dense.folder}: {note}" for note in dense.notes)


def _once(target: Target, notes: Callable) -> Iterator[str]:
    """Yield the notes of all layers; one that not all of them have begins with those that do."""
    layers_of: dict[str, list[str]] = {}
    for layer in target.layers:
        for note in notes(layer):
            layers_of.setdefault(note, []).append(layer.name)
    for note, layers in layers_of.items():
        yield note if len(layers) == len(target.layers) else f"{', '.join(layers)}: {note}"


def _scale(layer: Layer, fit: Fit) -> str:
    return (
        f"w2 of the experts is multiplied by {fit.scale:.6g}, because the weights of a token's "
        f"{layer.top_k} experts sum to {fit.weight_sum * layer.route_scale:.6g}"
        + (f", and {fit.granularity} of them make one copy." if fit.granularity > 1 else ".")
    )


def _unnormalized(layer: Layer, fit: Fit) -> str:
    most = "1" if layer.score_func == "softmax" else f"{layer.top_k}"
    return (
        "The weights of a token's experts are not normalized: they sum to "
        f"{fit.weight_sum:.6g} if all scores are equal, and to up to {most} if the "
        "router prefers some; the experts' output is too large by the same factor."
    )


_CLOSER = (
    " A smaller --router-std brings it closer; router_route_norm = true in the flavor makes it "
    "exact."
)
_SHARED = (
    "Shared experts: w2 is zero, so they add nothing at step 0; w1 and w3 are drawn "
    "with the dense weights' mean and standard deviation."
)
_PERTURBED = "The copies differ (--noise, --reinit), so the function differs from the dense one."
