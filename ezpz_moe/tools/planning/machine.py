"""A machine as data: how fast a rank computes, and how fast its links are. Seconds and bytes.

A machine is a TOML file: one of those in ``machines/``, the user's, or one that
:mod:`ezpz_moe.tools.calibration` has measured. What is measured or published has its source in the
file; what nobody has published is said to be an assumption there.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ezpz_moe.config.toml import read_toml
from ezpz_moe.errors import EzpzError, did_you_mean, short

FOLDER = Path(__file__).with_name("machines")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Positive = Annotated[float, Field(gt=0)]


class Curve(_Table):
    """A figure that was measured at several sizes.

    Attributes:
        sizes: from the smallest to the largest.
        values: one for each.
    """

    sizes: tuple[_Positive, ...] = Field(min_length=1)
    values: tuple[_Positive, ...]

    @model_validator(mode="after")
    def _in_order(self) -> Curve:
        if len(self.sizes) != len(self.values):
            raise ValueError(f"{len(self.sizes)} sizes have {len(self.values)} values")
        if any(small >= large for small, large in pairwise(self.sizes)):
            raise ValueError("sizes must rise")
        return self

    def at(self, size: float) -> float:
        """Return the value at a size: linear between the logarithms, level beyond both ends."""
        if size <= self.sizes[0]:
            return self.values[0]
        if size >= self.sizes[-1]:
            return self.values[-1]
        after = bisect_left(self.sizes, size)
        small, large = self.sizes[after - 1], self.sizes[after]
        low, high = self.values[after - 1], self.values[after]
        return low * (high / low) ** (log(size / small) / log(large / small))

    def beyond(self, size: float) -> float:
        """Return the same, but in proportion to the size above the largest one."""
        return self.at(size) * max(1.0, size / self.sizes[-1])


class Compute(_Table):
    """What a rank computes in a second, while all ranks of its node do.

    Attributes:
        bfloat16, float32: peak FLOP/s of dense matrix products.
        products: share of the peak that linear layers reach.
        experts: the same of routed experts, with what dispatches and combines.
        attention: the same of queries with keys, and the sum of values.
        alone: how many times faster a rank is while the others of its node wait: above 1 where they
            share cores.
        by_flops: share of ``products`` that one product of so many FLOPs reaches.
        backends: of a backend, by rows of an expert, the share of the peak that takes the place of
            ``experts``.
    """

    bfloat16: float = Field(gt=0)
    float32: float = Field(gt=0)
    products: float = Field(gt=0, le=1)
    experts: float = Field(gt=0, le=1)
    attention: float = Field(gt=0, le=1)
    alone: float = Field(default=1.0, ge=1)
    by_flops: Curve | None = None
    backends: dict[str, Curve] = {}


class Memory(_Table):
    """A rank's device memory: bytes, and bytes in a second."""

    size: float = Field(gt=0)
    bandwidth: float = Field(gt=0)


class Link(_Table):
    """A tier of links.

    Attributes:
        bandwidth: bytes that one rank sends in a second, in one direction.
        achieved: share of it that collectives reach.
        latency: seconds until the first byte of a message arrives.
    """

    bandwidth: float = Field(gt=0)
    achieved: float = Field(gt=0, le=1)
    latency: float = Field(ge=0)

    @property
    def rate(self) -> float:
        return self.bandwidth * self.achieved


Tier = Literal["node", "network"]
Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


class Measured(_Table):
    """Measured seconds of one collective, by bytes of the whole tensor.

    Attributes:
        tier: "node" or "network".
        kind: as :func:`.links.seconds` takes it.
        ranks: that take part.
        seconds: by bytes, as :func:`.links.seconds` counts them.
    """

    tier: Tier
    kind: Kind
    ranks: int = Field(ge=2)
    seconds: Curve


class Machine(_Table):
    """A machine.

    Attributes:
        name: for people.
        device: what a rank is; a CPU may train in float32 where it only emulates bfloat16.
        ranks_per_node: ranks that share a node, unless the command line says.
        compute, memory: of a rank.
        node: links between the ranks of a node.
        network: links between nodes, as one rank has them.
        overlap: share of the time of a collective beside computation that it hides.
        collectives: measured ones; where there are some of a tier and kind, they take the place of
            bandwidth and latency.
        sources: where each figure is from, or that it is an assumption.
    """

    name: str
    device: Literal["accelerator", "cpu"] = "accelerator"
    ranks_per_node: int = Field(ge=1)
    compute: Compute
    memory: Memory
    node: Link
    network: Link
    overlap: float = Field(default=1.0, ge=0, le=1)
    collectives: tuple[Measured, ...] = ()
    sources: dict[str, str]


def machine(name: str) -> Machine:
    """Return a machine by name, or from a file that ends in .toml.

    Raises:
        EzpzError: there is none, or a figure is missing or impossible.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in names():
        raise EzpzError(
            f"--machine {name!r}: there is no such machine.{did_you_mean(name, names())} Known are "
            f"{', '.join(names())}; or name a file that ends in .toml."
        )
    document = read_toml(path)
    try:
        return Machine.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f" = {short(str(first['input']))}"
        raise EzpzError(
            f"{path}: {key}{given}: {first['msg']}. docs/guides/plan.md says what a "
            "machine's file has."
        ) from None


def names() -> list[str]:
    """Return the machines that this package brings."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))
