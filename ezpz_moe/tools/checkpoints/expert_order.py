"""The order of a checkpoint's experts: which it may have, and the file that remembers the first.

An order says of each expert which number it had: expert i of a layer was expert ``order[layer][i]``
before. A checkpoint whose experts were reordered keeps in :data:`FILE` which number each had at
first: every further reordering is composed with it, and a run that goes on leaves it beside every
later step, so that the way back stays known. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ezpz_moe.errors import EzpzError, short
from ezpz_moe.hosts.dcp import expert_order as file_of
from ezpz_moe.hosts.dcp.expert_order import FILE

if TYPE_CHECKING:
    from ezpz_moe.config.flavor_schema import Flavor
    from ezpz_moe.config.job import Job

Order: TypeAlias = Mapping[int, Sequence[int]]
"""By layer: the former number of each expert. A layer that is absent keeps its order."""

_FIRST_NUMBERS = "first_numbers"


def why_not_reorder(flavor: Flavor, job: Job) -> list[str]:
    """Return every reason for which a run's experts have to keep their numbers.

    Each is a sentence or two that name the flavor or the job, and say what to do. Without any,
    every order computes the same that :func:`check_order` allows.

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
            "numbers, so every rank has the same load already. Leave their order as it is."
        )
    # With routing = "relu" a token uses exactly those that do not tie at zero.
    if router.activation == "relu_rmsnorm" and router.routing != "relu":
        yield (
            f'{flavor.source}: [router] activation = "relu_rmsnorm" gives all experts with '
            "negative logits the same score, and of equal ones the number decides: in another "
            "order the model would compute something else. Leave it as it is."
        )


def _of_job(job: Job) -> Iterator[str]:
    # Not at the top: `ckpt inspect` needs nothing of jobs, and is to answer at once.
    from ezpz_moe.config.train_only import ALL

    if job.values.get("debug.moe_force_load_balance"):
        yield (
            f"{job.source}: debug.moe_force_load_balance = true takes experts in turn, by their "
            "numbers. Remove it."
        )
    if job.values.get("train_only.experts", {}) not in ({}, ALL):
        yield (
            f"{job.source}: [train_only] experts names experts by numbers, which would be those of "
            "others. Reorder them with a job that lacks it, and write their new numbers into it: "
            f"{FILE} in the new checkpoint says which expert had which."
        )


def check_order(order: Order, experts: Mapping[int, int], *, groups: int = 1) -> None:
    """Check that a model's experts may have this order.

    Args:
        order: of some layers or all.
        experts: how many a layer has, without its zero-computation experts: those keep their
            numbers, behind the others.
        groups: into which the router divides a layer's experts. Experts may change places within
            their group, and groups as a whole.

    Raises:
        EzpzError: a layer has no experts, its order is not one of its experts, or tears a group.
    """
    for layer, former in order.items():
        if layer not in experts:
            known = ", ".join(map(str, sorted(experts)))
            raise EzpzError(f"layer {layer} has no experts to reorder; layers {known} have.")
        number = experts[layer]
        if sorted(former) != list(range(number)):
            raise EzpzError(
                f"layer {layer}: an order names each of its experts 0 to {number - 1} once, and "
                f"this one is {short(str(list(former)))}. Zero-computation experts are not among "
                "them: they stay last."
            )
        size = number // groups
        for first in range(0, number, size):
            together = former[first : first + size]
            if len({expert // size for expert in together}) > 1:
                raise EzpzError(
                    f"layer {layer}: experts {first} to {first + size - 1} would be "
                    f"{short(str(list(together)))}, which are of several of the router's {groups} "
                    f"groups. Experts may change places within a group of {size}, and groups as a "
                    "whole."
                )


def inverse(order: Order) -> dict[int, list[int]]:
    """Return the order that undoes ``order``."""
    return {
        layer: sorted(range(len(former)), key=former.__getitem__) for layer, former in order.items()
    }


def composed(first: Order, then: Order) -> dict[int, list[int]]:
    """Return one order for ``first`` and ``then`` after it, of the layers that it changes."""
    both = {layer: list(former) for layer, former in first.items()}
    for layer, former in then.items():
        before = both.get(layer, range(len(former)))
        both[layer] = [before[number] for number in former]
    return {layer: former for layer, former in sorted(both.items()) if former != sorted(former)}


def read_order(checkpoint: Path) -> dict[int, list[int]]:
    """Return which number each expert had at first, by layer; nothing if all have those.

    ``inverse`` of it is the order in which they have them again.

    Raises:
        EzpzError: the file is damaged.
    """
    if (said := file_of.read(checkpoint)) is None:
        return {}
    try:
        found = json.loads(said)[_FIRST_NUMBERS]
        order = {int(layer): [int(number) for number in of] for layer, of in found.items()}
        check_order(order, {layer: len(former) for layer, former in order.items()})
    except (ValueError, TypeError, LookupError, AttributeError, EzpzError) as error:
        raise EzpzError(
            f"{checkpoint / FILE}: does not say which number each expert had at first: {error}. "
            "Take the file from where the checkpoint was copied; without it the way back is lost."
        ) from error
    return order


def write_order(checkpoint: Path, order: Order) -> None:
    """Write which number each expert had at first; no file if all have those.

    Raises:
        OSError: the file cannot be written.
    """
    if order:
        text = json.dumps({_FIRST_NUMBERS: {layer: list(of) for layer, of in order.items()}})
        file_of.write(checkpoint, f"{text}\n".encode())
