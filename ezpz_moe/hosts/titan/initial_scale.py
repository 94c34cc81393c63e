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
from torchtitan.models.common.param_init import depth_scaled_std
from torchtitan.protocols.module import Module

BASE = 0.02
"""What every model of the host draws the weights of its layers with, before it scales them."""

Draw = Callable[[Tensor], Any]
"""An initializer: it fills a tensor in place."""


class Place(NamedTuple):
    """Layer ``layer`` of ``layers``."""

    layer: int
    layers: int

    # In the host's own words, so that the values are its own to the last bit.
    @property
    def std_by_layer(self) -> float:
        """Return the standard deviation that shrinks with the layer's number."""
        return depth_scaled_std(BASE, self.layer)

    @property
    def std_by_depth(self) -> float:
        """Return the one that shrinks with the number of layers."""
        return BASE / (2 * self.layers) ** 0.5


def std_of(draw: Draw) -> float | None:
    """Return the standard deviation that is bound to an initializer; None if there is none."""
    if isinstance(draw, partial):
        std = draw.keywords.get("std")
        return None if std is None else float(std)
    # The host's fused projections wrap the initializer of their slices in a function of theirs.
    inner = (cell.cell_contents for cell in getattr(draw, "__closure__", None) or ())
    found = [std for each in inner if callable(each) and (std := std_of(each)) is not None]
    return found[0] if found else None


def with_std(draw: Draw, std: float) -> Draw:
    """Return the initializer with another standard deviation.

    Args:
        draw: one for which :func:`std_of` knows it.
        std: the new one.
    """
    old = std_of(draw)
    assert old is not None
    if std == old:
        return draw
    if isinstance(draw, partial):
        # Bounds that are given are multiples of std; torch's own are far outside of it.
        words = draw.keywords
        bounds = {key: words[key] / old * std for key in ("a", "b") if key in words}
        return partial(draw.func, *draw.args, **(words | bounds | {"std": std}))
    return partial(_draw_and_multiply, draw, std / old)


def _draw_and_multiply(draw: Draw, factor: float, tensor: Tensor) -> None:
    draw(tensor)
    with torch.no_grad():
        tensor.mul_(factor)


def moved(draw: Draw, old: Place, new: Place) -> Draw:
    """Return the initializer that the host would have at another place."""
    std = std_of(draw)
    if std is None:
        return draw
    if math.isclose(std, old.std_by_layer):
        return with_std(draw, new.std_by_layer)
    if math.isclose(std, old.std_by_depth):
        return with_std(draw, new.std_by_depth)
    return draw


def widened(draw: Draw, old_dim: int, new_dim: int) -> Draw:
    """Return the initializer of an output head for another width; some shrink with it."""
    std = std_of(draw)
    shrinks = std is not None and math.isclose(std, old_dim**-0.5)
    return with_std(draw, new_dim**-0.5) if shrinks else draw


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
