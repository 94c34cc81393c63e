"""A job's ``[train_only]``: which experts learn, while everything else keeps its bits.

``experts`` is a table of layers, ``"all"``, or the file of ``ezpz-moe analyze --attribute``. Of a
file, a layer's experts learn that have most of the text's tokens: as few as together have ``share``
of them, which is the choice of ESFT, arXiv 2407.01906, by tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Gt, Le
from pydantic import Field, TypeAdapter, ValidationError

from ezpz_moe.config.job import Job
from ezpz_moe.config.schema import Data
from ezpz_moe.errors import EzpzError

ALL = "all"
DEFAULT_SHARE = 0.2
Share = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class TrainOnly:
    """What learns.

    Attributes:
        experts: the numbers of those that learn, by layer; None: all of every layer.
        router: whether gates learn too.
        anchor: coefficient of the loss that keeps tokens with the experts that learn.
        source: who says so, for messages.
    """

    experts: Mapping[int, tuple[int, ...]] | None
    router: bool
    anchor: float
    source: str


class Attributed(Data):
    """What an expert has of a text: of its tokens' choices, and of their weights."""

    layer: Annotated[int, Field(ge=0)]
    expert: Annotated[int, Field(ge=0)]
    share_of_tokens: Annotated[float, Field(ge=0, le=1)]
    share_of_weight: Annotated[float, Field(ge=0, le=1)]


class Attribution(Data):
    """What ``ezpz-moe analyze --attribute`` writes, as far as it says which experts learn."""

    experts: list[Attributed]


def train_only_of(job: Job) -> TrainOnly | None:
    """Return what the job's ``[train_only]`` says, or None without one.

    Raises:
        EzpzError: it says nothing that learns, or the file cannot be read.
    """
    said = {
        key.removeprefix("train_only."): value
        for key, value in job.values.items()
        if key.startswith("train_only.")
    }
    if not said:
        return None
    source = f"{job.source}: [train_only]"
    experts, share = said.get("experts", {}), said.get("share")
    router, anchor = said.get("router", False), said.get("anchor", 0.0)
    if share is not None and (not isinstance(experts, str) or experts == ALL):
        raise EzpzError(
            f"{source} share = {share} has no effect: it chooses from a file, and experts names "
            "them. Remove it, or give experts the file of `ezpz-moe analyze --attribute`."
        )
    if isinstance(experts, dict):
        chosen: Mapping[int, tuple[int, ...]] | None = dict(_numbered(experts, source))
    elif experts == ALL:
        chosen = None
    else:
        chosen = _attributed(Path(job.resolve(experts)), share or DEFAULT_SHARE, source)
    if chosen is not None and not any(chosen.values()) and not router:
        raise EzpzError(
            f'{source}: nothing would learn. Name experts, such as experts = {{ "3" = [5] }}, or '
            "set router = true."
        )
    return TrainOnly(chosen, router, anchor, source)


def _numbered(
    experts: Mapping[str, list[int]], source: str
) -> Iterator[tuple[int, tuple[int, ...]]]:
    for layer, numbers in experts.items():
        if not layer.isdecimal():
            raise EzpzError(
                f'{source} experts: "{layer}" is no number of a layer. Write the layers as '
                '`ezpz-moe analyze` numbers them, such as experts = { "3" = [5] }.'
            )
        twice = [number for number in numbers if numbers.count(number) > 1]
        if twice:
            raise EzpzError(f'{source} experts: "{layer}" names expert {twice[0]} twice.')
        yield int(layer), tuple(sorted(numbers))


def _attributed(path: Path, share: float, source: str) -> dict[int, tuple[int, ...]]:
    """Return the experts that have ``share`` of each layer's tokens, by layer."""
    try:
        found = TypeAdapter(Attribution).validate_json(path.read_bytes(), extra="ignore")
    except OSError as error:
        raise EzpzError(f"{source} experts = {str(path)!r}: {error.strerror}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise EzpzError(
            f"{source} experts = {str(path)!r}: {where}: {first['msg']}. It is to be the file of "
            "`ezpz-moe analyze CHECKPOINT --attribute TEXT --out FILE`."
        ) from error
    layers: dict[int, list[Attributed]] = defaultdict(list)
    for each in found.experts:
        layers[each.layer].append(each)
    return {
        layer: fewest({each.expert: each.share_of_tokens for each in of_layer}, share)
        for layer, of_layer in sorted(layers.items())
    }


def fewest(shares: Mapping[int, float], share: float) -> tuple[int, ...]:
    """Return the fewest experts, by number, that together have so much."""
    chosen: list[int] = []
    together = 0.0
    for expert in sorted(shares, key=lambda expert: (-shares[expert], expert)):
        if together >= share:
            break
        chosen.append(expert)
        together += shares[expert]
    return tuple(sorted(chosen))
