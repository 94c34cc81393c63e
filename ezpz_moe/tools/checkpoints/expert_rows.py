"""Which tensors of a checkpoint count a layer's experts, in which dimension, and taking some rows.

Names are those of any generation (:mod:`.names`): weights, buffers, and what an optimizer keeps for
a weight. Below ``moe.`` every name has to be known here. One that is not is refused: that a
dimension is as long as there are experts says nothing about what it counts.

Legend: E = routed experts of a layer, Z = its zero-computation experts, which a router numbers
after the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ezpz_moe.errors import EzpzError

_STACKS = re.compile(
    r"routed_experts\.inner_experts\.(w1_EFD|w2_EDF|w3_EFD|b1_EF|b2_ED|b3_EF"
    r"|mlp1_weight_EGD|mlp1_bias_EG|mlp2_weight_EDF|mlp2_bias_ED)"
    r"|routed_experts\.(w13|w2)\.(weight|bias)"  # since September 2026
    r"|experts\.(w[123]|mlp[12]_(weight|bias))"  # 0.2
)
"""E rows."""
_OF_CHOICES = re.compile(r"router\.gate\.(weight|bias|scale_E)|expert_bias(_E)?")
"""E + Z rows."""
_RESIDUAL = "router.gate.residual.weight"
"""E + Z rows, and as many columns as the layer with experts before has rows here."""
_OF_LAYER = re.compile(r"shared_experts\..+|routed_experts\.(constant_experts\..+|(de|a)scend\..+)")
"""Of no routed expert in particular."""

_OF_OPTIMIZER = re.compile(r"optimizer\.state\.(?P<weight>.+)\.(?P<kept>[^.]+)")
_IN_LAYER = re.compile(r"(?P<layer>.*?(?P<number>\d+))\.moe\.(?P<part>.+)")


@dataclass(frozen=True)
class Dim:
    """A dimension of a tensor that counts the experts of a layer: E of them, or all E + Z choices.

    Attributes:
        dim: its number.
        layer: whose experts these are, such as "layers.3".
    """

    dim: int
    layer: str


@dataclass(frozen=True)
class ExpertRows:
    """The experts of a checkpoint.

    Attributes:
        num_experts: E by layer, such as "layers.3", in the model's order.
        dims: of every tensor that counts experts, by name; also of an optimizer's.
    """

    num_experts: Mapping[str, int]
    dims: Mapping[str, tuple[Dim, ...]]

    def take(
        self,
        name: str,
        tensor: torch.Tensor,
        experts: Mapping[str, Sequence[int]],
        behind: Mapping[str, Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """Return some experts' part of a tensor, in the order that is asked for, bit for bit.

        Args:
            name: the tensor's. One that counts no experts is returned as it is.
            tensor: the whole one.
            experts: their numbers by layer: fewer than E, or all of them in another order. A layer
                that is not in it keeps its own. Zero-computation experts stay, behind the others.
            behind: further ones by layer, which a router has behind the zero-computation ones, and
                a stack has not.
        """
        for place in self.dims.get(name, ()):
            if (chosen := experts.get(place.layer)) is not None:
                rows = [*chosen, *range(self.num_experts[place.layer], tensor.shape[place.dim])]
                if behind and not is_stack(_weight(name)):
                    rows += behind.get(place.layer, ())
                index = torch.tensor(rows, device=tensor.device)
                tensor = tensor.index_select(place.dim, index)
        return tensor


def expert_rows(sizes: Mapping[str, Sequence[int]]) -> ExpertRows:
    """Find the experts in a checkpoint.

    Args:
        sizes: of all its tensors, by name.

    Raises:
        EzpzError: a tensor of a layer with experts is not known, or its sizes are not those of the
            layer's experts.
    """
    layers = _layers(sizes)
    # Not those of `mtp_layers.`: they are numbered anew, and see no logits of others.
    of_model = (layer for layer in layers if layer.startswith("layers."))
    before = {after: of for of, after in pairwise(of_model)}
    dims = {}
    for name, size in sizes.items():
        if found := _dims(name, before):
            dims[name] = found
            _check(name, size, found, layers)
    dims |= _of_optimizer(sizes, dims)
    return ExpertRows(layers, dims)


def is_stack(name: str) -> bool:
    """Return whether a weight has exactly a row for each routed expert of a layer."""
    found = _parts(name)
    return found is not None and _STACKS.fullmatch(found["part"]) is not None


def _weight(name: str) -> str:
    """Return the weight for which an optimizer keeps a tensor; the name itself of any other."""
    state = _OF_OPTIMIZER.fullmatch(name)
    return state["weight"] if state else name


def _layers(sizes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return E by layer, in the order of their numbers."""
    found: dict[tuple[int, str], int] = {}
    for name, size in sizes.items():
        if is_stack(name) and (place := _parts(name)):
            found.setdefault((int(place["number"]), place["layer"]), size[0])
    return {layer: experts for (_, layer), experts in sorted(found.items())}


def _parts(name: str) -> re.Match[str] | None:
    return None if name.startswith("optimizer.") else _IN_LAYER.fullmatch(name)


def _dims(name: str, before: Mapping[str, str]) -> tuple[Dim, ...]:
    """Return where a weight or buffer counts experts.

    Args:
        name: its name.
        before: the layer with experts before each of them.
    """
    if (place := _parts(name)) is None or _OF_LAYER.fullmatch(place["part"]):
        return ()
    layer, part = place["layer"], place["part"]
    if _STACKS.fullmatch(part) or _OF_CHOICES.fullmatch(part):
        return (Dim(0, layer),)
    if part == _RESIDUAL and layer in before:
        return Dim(0, layer), Dim(1, before[layer])
    raise EzpzError(
        f"{name}: ezpz_moe does not know whether this has rows of experts, and guesses no tensor's "
        "meaning from its sizes. Leave the checkpoint's experts as they are."
    )


def _check(
    name: str, size: Sequence[int], places: Sequence[Dim], layers: Mapping[str, int]
) -> None:
    """Refuse a tensor that cannot count these layers' experts."""
    for place in places:
        experts = layers.get(place.layer, 0)
        has = size[place.dim] if place.dim < len(size) else 0
        if not experts or has < experts or (is_stack(name) and has > experts):
            raise EzpzError(
                f"{name}: is {list(size)}, which does not fit the {experts} experts of "
                f"{place.layer}. Is the checkpoint whole?"
            )


def _of_optimizer(
    sizes: Mapping[str, Sequence[int]], dims: Mapping[str, tuple[Dim, ...]]
) -> dict[str, tuple[Dim, ...]]:
    """Return where what an optimizer keeps counts experts: as its weight, if it is of that size."""
    found = {}
    for name, size in sizes.items():
        state = _OF_OPTIMIZER.fullmatch(name)
        # A number, such as a count of steps, is of all experts together.
        if state is None or state["weight"] not in dims or not len(size):
            continue
        if tuple(size) != tuple(sizes[state["weight"]]):
            raise EzpzError(
                f"{name}: is {list(size)}, and its weight {list(sizes[state['weight']])}: ezpz_moe "
                "does not know which of it is an expert's. Start from the model alone: a "
                "checkpoint with last_save_model_only = true."
            )
        found[name] = dims[state["weight"]]
    return found
