"""Move the host's initial values to another depth, width or scale.

The host draws a weight with a standard deviation of 0.02, in some of its models and weights scaled
with depth: by 1/sqrt(2(i + 1)) in layer i, or by 1/sqrt(2 n) in each of n layers. An initializer
is a function of the tensor alone, so its scale is read from the arguments that are bound to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchtitan.protocols.module import Module

BASE = 0.02
"""What every model of the host draws the weights of its layers with, before it scales them."""

Draw = Callable[[Tensor], Any]
"""An initializer: it fills a tensor in place."""


class Place(NamedTuple):
    """Layer ``layer`` of ``layers``."""

    layer: int
    layers: int

    @property
    def by_layer(self) -> float:
        """The factor that shrinks with the layer's number."""
        return (2 * (self.layer + 1)) ** -0.5

    @property
    def by_depth(self) -> float:
        """The factor that shrinks with the model's depth."""
        return (2 * self.layers) ** -0.5


def std_of(draw: Draw) -> float | None:
    """Return the standard deviation that is bound to an initializer; None if there is none."""
    if isinstance(draw, partial):
        std = draw.keywords.get("std")
        return None if std is None else float(std)
    # The host's fused projections wrap the initializer of their slices in a function of theirs.
    inner = (cell.cell_contents for cell in getattr(draw, "__closure__", None) or ())
    found = [std for each in inner if callable(each) and (std := std_of(each)) is not None]
    return found[0] if found else None


def scaled(draw: Draw, factor: float) -> Draw:
    """Return an initializer whose values are ``factor`` times those of ``draw``."""
    if math.isclose(factor, 1.0):
        return draw  # the host's values, bit for bit
    if isinstance(draw, partial) and "std" in draw.keywords:
        # Bounds that are given are multiples of std; those that are not are too far away to matter.
        words = {key: draw.keywords[key] * factor for key in ("std", "a", "b") & draw.keywords.keys()}
        return partial(draw.func, *draw.args, **draw.keywords | words)
    return partial(_draw_and_multiply, draw, factor)


def _draw_and_multiply(draw: Draw, factor: float, tensor: Tensor) -> None:
    draw(tensor)
    with torch.no_grad():
        tensor.mul_(factor)


def factor_at(draw: Draw, place: Place) -> float | None:
    """Return what the host scales ``BASE`` with there; None if it draws something else."""
    std = std_of(draw)
    if std is not None:
        for factor in (1.0, place.by_layer, place.by_depth):
            if math.isclose(std, BASE * factor):
                return factor
    return None


def moved(draw: Draw, old: Place, new: Place) -> Draw:
    """Return the initializer that the host would have at another place."""
    found = factor_at(draw, old)
    if found == old.by_layer:
        return scaled(draw, new.by_layer / old.by_layer)
    if found == old.by_depth:
        return scaled(draw, new.by_depth / old.by_depth)
    return draw


def widened(draw: Draw, old_dim: int, new_dim: int) -> Draw:
    """Return the initializer of an output head for another width; some shrink with it."""
    std = std_of(draw)
    shrinks = std is not None and math.isclose(std, old_dim**-0.5)
    return scaled(draw, (old_dim / new_dim) ** 0.5) if shrinks else draw


def initialized(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield every node of a config's tree that has initializers, with its path."""
    for path, each, _, _ in node.traverse(Module.Config, recurse=True):
        if each.param_init:
            yield path, each


def replace_each(node: Any, change: Callable[[str, str, Draw], Draw]) -> None:
    """Replace the initializers below ``node``, in place; ``change`` gets path, parameter and it."""
    done: set[int] = set()
    for path, each in initialized(node):
        if id(each) in done:
            continue  # layers share nodes
        done.add(id(each))
        # A new dict: the host's models share theirs.
        each.param_init = _changed(path, each.param_init, change)


def _changed(
    path: str, draws: Mapping[str, Draw], change: Callable[[str, str, Draw], Draw]
) -> dict[str, Draw]:
    return {name: change(path, name, draw) for name, draw in draws.items()}
