"""Which layers have experts, and how large these are in each: what a flavor says of it.

Layers count from 0, as in the names of a model's parameters. The sizes of a layer's experts are a
number for all layers, a list with one for each layer with experts, or a ramp over these layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeAlias

from pydantic import Discriminator, Field, Tag, model_validator

from ezpz_moe.config.routing_schema import Experts
from ezpz_moe.config.schema import Data, Width, mistake

_NUMBER, _LIST, _TABLE = FORMS = ("a number", "a list", "a table")
"""The forms of a value, as pydantic names them in the place of a mistake."""


def _form(value: object) -> str:
    if isinstance(value, list | tuple):
        return _LIST
    return _TABLE if isinstance(value, dict | Data) else _NUMBER


def _form_of_places(value: object) -> str:
    # Other words than "all" go to the table, whose message names every form.
    return _NUMBER if value == "all" else _LIST if _form(value) == _LIST else _TABLE


class Ramp(Data):
    """A size that moves from ``first`` to ``last`` in equal steps, over the layers with experts.

    Every size between is the nearest multiple of ``multiple_of``; of two as near, the larger.
    Without it, of the greatest common divisor of both ends: what divides both, such as a degree of
    expert parallelism, then divides all.
    """

    first: Experts
    last: Experts
    multiple_of: Experts | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_whole(cls, value: object) -> object:
        keys = value.keys() if isinstance(value, dict) else {"first", "last"}
        if {"first", "last"} <= keys <= cls.model_fields.keys():
            return value
        raise mistake(
            "should be an integer, a list of them with one for each layer with experts, or a table "
            "of first, last and perhaps multiple_of, such as { first = 8, last = 64 }"
        )

    @model_validator(mode="after")
    def _fits_its_ends(self) -> Self:
        step = self.multiple_of
        for key, end in (("first", self.first), ("last", self.last)):
            if step is not None and end % step:
                raise mistake(f"{key} = {end} is no multiple of multiple_of = {step}; change one")
        return self

    def over(self, layers: int) -> tuple[int, ...]:
        """Return the size in each of so many layers; a single one has ``first``."""
        step = self.multiple_of or math.gcd(self.first, self.last)
        parts = max(layers - 1, 1)
        exact = (self.first * (parts - i) + self.last * i for i in range(layers))  # times `parts`
        # In whole numbers: 2.5 steps are exactly that, and go up.
        return tuple((2 * each + step * parts) // (2 * step * parts) * step for each in exact)


class WidthRamp(Ramp):
    """A ramp of a hidden dimension."""

    first: Width
    last: Width
    multiple_of: Width | None = None


class Every(Data):
    """``{ every = 2 }``: the second layer, the fourth and so on, which are 1, 3, 5."""

    every: Annotated[int, Field(ge=1)]

    @model_validator(mode="before")
    @classmethod
    def _is_whole(cls, value: object) -> object:
        if isinstance(value, cls) or (isinstance(value, dict) and value.keys() == {"every"}):
            return value
        raise mistake('should be "all", a list of layers such as [1, 3, 5], or { every = 2 }')


_LayerNumber = Annotated[int, Field(ge=0)]

# Lists are not strict, or what TOML has would be no tuple; their items are.
ExpertsByLayer: TypeAlias = Annotated[
    Annotated[Experts, Tag(_NUMBER)]
    | Annotated[tuple[Experts, ...], Field(strict=False), Tag(_LIST)]
    | Annotated[Ramp, Tag(_TABLE)],
    Discriminator(_form),
]
"""How many experts, of a layer or of a token."""

WidthByLayer: TypeAlias = Annotated[
    Annotated[Width, Tag(_NUMBER)]
    | Annotated[tuple[Width, ...], Field(strict=False), Tag(_LIST)]
    | Annotated[WidthRamp, Tag(_TABLE)],
    Discriminator(_form),
]
"""The hidden dimension of an expert."""

MoeLayers: TypeAlias = Annotated[
    Annotated[Literal["all"], Tag(_NUMBER)]
    | Annotated[tuple[_LayerNumber, ...], Field(strict=False), Tag(_LIST)]
    | Annotated[Every, Tag(_TABLE)],
    Discriminator(_form_of_places),
]
"""The layers that have experts."""

ByLayer: TypeAlias = int | tuple[int, ...] | Ramp


class LayerSizes(NamedTuple):
    """The routed experts of one layer: E, k and F."""

    num_experts: int
    top_k: int
    hidden_dim: int


def moe_layer_numbers(
    n_layers: int, n_dense_layers: int | None, moe_layers: MoeLayers | None
) -> tuple[int, ...]:
    """Return the numbers of the layers with experts, as far as there are such layers."""
    match moe_layers:
        case None:
            return tuple(range(n_dense_layers or 0, n_layers))
        case "all":
            return tuple(range(n_layers))
        case Every(every=every):
            return tuple(range(every - 1, n_layers, every))
        case _:
            return tuple(moe_layers)


def place_conflicts(
    n_layers: int, n_dense_layers: int | None, moe_layers: MoeLayers | None
) -> Iterator[str]:
    """Yield why these cannot be the layers with experts."""
    if moe_layers is None:
        if n_dense_layers is None:
            yield 'neither n_dense_layers nor moe_layers is set. Set one: moe_layers = "all"'
        elif n_dense_layers > n_layers:
            yield f"n_dense_layers ({n_dense_layers}) must not exceed n_layers ({n_layers})"
        return
    if n_dense_layers is not None:
        yield (
            f"n_dense_layers ({n_dense_layers}) and moe_layers both say which layers have experts. "
            "Remove one"
        )
    numbers = moe_layer_numbers(n_layers, None, moe_layers)
    if not numbers:
        yield f"moe_layers names none of the {n_layers} layers, so no layer has experts"
    if absent := [number for number in numbers if number >= n_layers]:
        yield f"moe_layers has layer {absent[0]}, but the last of n_layers is {n_layers - 1}"
    if list(numbers) != sorted(set(numbers)):
        yield f"moe_layers repeats a layer or is out of order: write {sorted(set(numbers))}"


def length_conflicts(said: Mapping[str, ByLayer], layers: int) -> Iterator[str]:
    """Yield which of the keys do not say a size for each of so many layers with experts."""
    for key, value in said.items():
        if isinstance(value, tuple) and len(value) != layers:
            yield (
                f"{key} lists {len(value)} sizes, but {layers} layers have experts: list {layers}"
            )
        if isinstance(value, Ramp) and layers == 1 and value.first != value.last:
            yield (
                f"{key} goes from {value.first} to {value.last}, but one layer alone has experts: "
                "write a number"
            )


def sizes_of(said: ByLayer, layers: int) -> tuple[int, ...]:
    """Return the size in each of so many layers with experts."""
    if isinstance(said, Ramp):
        return said.over(layers)
    return said if isinstance(said, tuple) else (said,) * layers


def one_or_each(sizes: Sequence[int]) -> int | tuple[int, ...]:
    """Return the size that all layers have, or each layer's if they differ."""
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def in_words(sizes: Any) -> str:
    """Return what :func:`one_or_each` returns as 8, or 8-64 for sizes from 8 to 64.

    >>> in_words(8), in_words((64, 8, 16))
    ('8', '8-64')
    """
    return f"{min(sizes)}-{max(sizes)}" if isinstance(sizes, tuple) else str(sizes)
