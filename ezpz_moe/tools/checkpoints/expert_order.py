"""The order of a checkpoint's experts: which ones are allowed, and the file that remembers the first.

An order says of each expert which number it had: expert i of a layer was expert ``order[layer][i]``
before. A checkpoint whose experts were reordered keeps the order that leads back to its first
numbers in :data:`FILE`; every further reordering is composed with it. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from ezpz_moe.config.flavor_schema import Flavor
from ezpz_moe.config.job import Job
from ezpz_moe.config.routing_schema import Experts
from ezpz_moe.config.schema import Data
from ezpz_moe.config.train_only import ALL
from ezpz_moe.errors import EzpzError

Order: TypeAlias = Mapping[int, Sequence[int]]
"""By layer: the former number of each expert. A layer that is absent keeps its order."""

FILE = "expert_order.json"
"""Beside the metadata of a checkpoint whose experts have other numbers than they began with."""

_Number = Annotated[int, Field(ge=0)]


class _Remembered(Data):
    """What :data:`FILE` holds: expert i of a layer had the number ``first_numbers[layer][i]``."""

    first_numbers: dict[str, list[_Number]]


def why_not_reorder(flavor: Flavor, job: Job) -> list[str]:
    """Return every reason for which a run's experts have to keep their numbers; none if any order will do.

    Each is a sentence that says what to do, and names the flavor or the job.

    Args:
        flavor: the run's.
        job: what it trains with; that of a flavor alone has no keys.
    """
    return [*_of_flavor(flavor), *_of_job(job)]


def _of_flavor(flavor: Flavor) -> Iterator[str]:
    router = flavor.router
    if flavor.is_dense:
        yield f"{flavor.source}: no layer has experts."
    if router.routing == "balanced":
        yield (
            f'{flavor.source}: [router] routing = "balanced" takes experts in turn, by their '
            "numbers, so every rank has the same load already. Leave the order as it is."
        )
    # With routing = "relu" a token uses exactly those that do not tie at zero.
    if router.activation == "relu_rmsnorm" and router.routing != "relu":
        yield (
            f'{flavor.source}: [router] activation = "relu_rmsnorm" gives all experts with '
            "negative logits the same score, and of equal ones the first are chosen: in another "
            "order the model would compute something else. Leave the order as it is."
        )


def _of_job(job: Job) -> Iterator[str]:
    if job.values.get("debug.moe_force_load_balance"):
        yield (
            f"{job.source}: debug.moe_force_load_balance = true takes experts in turn, by their "
            "numbers. Remove it."
        )
    if job.values.get("train_only.experts", {}) not in ({}, ALL):
        yield (
            f"{job.source}: [train_only] experts names experts by their numbers, which would be "
            "those of others. Place the experts of a job without [train_only], and give the new "
            f"numbers to that table: {FILE} in the new checkpoint says which expert had which."
        )


def check_order(order: Order, experts: Mapping[int, int], *, groups: int = 1) -> None:
    """Check that a checkpoint's experts may have this order.

    Args:
        order: of some layers or all.
        experts: how many a layer has, E, without its zero-computation experts: those keep their
            numbers, behind the others.
        groups: of experts that the router limits a token's choice to. Experts may change places
            within their group, and groups as a whole.

    Raises:
        EzpzError: a layer has no experts, its order is none of its experts, or a group is torn.
    """
    for layer, former in order.items():
        if layer not in experts:
            known = ", ".join(map(str, sorted(experts)))
            raise EzpzError(f"layer {layer} has no experts, so no order. Those that do: {known}.")
        number = experts[layer]
        if sorted(former) != list(range(number)):
            raise EzpzError(
                f"layer {layer}: its order has to name each expert from 0 to {number - 1} once, "
                f"and is {_shown(former)}. Zero-computation experts are not among them: they stay "
                "last."
            )
        size = number // groups
        for first in range(0, number, size):
            together = former[first : first + size]
            if len({expert // size for expert in together}) > 1:
                raise EzpzError(
                    f"layer {layer}: experts {first} to {first + size - 1} would be "
                    f"{_shown(together)}, of several of the router's {groups} groups. Experts may "
                    "change places within a group of {size}, and groups as a whole.".format(
                        size=size
                    )
                )


def inverse(order: Order) -> dict[int, list[int]]:
    """Return the order that undoes ``order``."""
    undone: dict[int, list[int]] = {}
    for layer, former in order.items():
        undone[layer] = sorted(range(len(former)), key=former.__getitem__)
    return undone


def composed(first: Order, then: Order) -> dict[int, list[int]]:
    """Return one order for ``first`` and ``then`` after it, without layers that are as they were."""
    both = {layer: list(former) for layer, former in first.items()}
    for layer, former in then.items():
        before = both.get(layer, range(len(former)))
        both[layer] = [before[number] for number in former]
    return {
        layer: former for layer, former in sorted(both.items()) if former != sorted(former)
    }


def read_order(folder: Path) -> dict[int, list[int]]:
    """Return the first numbers of a checkpoint's experts by layer; nothing if they still have them.

    Raises:
        EzpzError: the file is damaged.
    """
    path = folder / FILE
    try:
        found = TypeAdapter(_Remembered).validate_json(path.read_bytes())
        order = {int(layer): numbers for layer, numbers in found.first_numbers.items()}
        check_order(order, {layer: len(numbers) for layer, numbers in order.items()})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, EzpzError) as error:
        raise EzpzError(f"{path}: cannot be read: {_first_line(error)}") from error
    return order


def write_order(folder: Path, order: Order) -> None:
    """Write the first numbers of a checkpoint's experts; no file if they have them.

    Raises:
        OSError: the file cannot be written.
    """
    if order:
        text = json.dumps({"first_numbers": {layer: list(of) for layer, of in order.items()}})
        with (folder / FILE).open("w") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
