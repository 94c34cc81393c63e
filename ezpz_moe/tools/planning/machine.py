"""A machine as data: how fast a rank computes, and how fast its links are. Seconds and bytes.

A machine is a TOML file, one of those in ``machines/`` or the user's. What is measured or published
has its source in the file; what nobody has published is said to be an assumption there.
"""

from __future__ import annotations

from math import ceil, log2
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ezpz_moe.config.toml import read_toml
from ezpz_moe.errors import EzpzError, did_you_mean, short

FOLDER = Path(__file__).with_name("machines")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Compute(_Table):
    """What a rank computes in a second.

    Attributes:
        bfloat16, float32: peak FLOP/s of dense matrix products.
        products: share of the peak that linear layers reach.
        experts: the same of routed experts, with what dispatches and combines.
        attention: the same of queries with keys, and the sum of values.
    """

    bfloat16: float = Field(gt=0)
    float32: float = Field(gt=0)
    products: float = Field(gt=0, le=1)
    experts: float = Field(gt=0, le=1)
    attention: float = Field(gt=0, le=1)


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


class Machine(_Table):
    """A machine.

    Attributes:
        name: for people.
        device: what a rank is; a CPU may train in float32 where it only emulates bfloat16.
        ranks_per_node: ranks that share a node, unless the command line says.
        compute, memory: of a rank.
        node: links between the ranks of a node.
        network: links between nodes, as one rank has them.
        sources: where each figure is from, or that it is an assumption.
    """

    name: str
    device: Literal["accelerator", "cpu"] = "accelerator"
    ranks_per_node: int = Field(ge=1)
    compute: Compute
    memory: Memory
    node: Link
    network: Link
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


def seconds(
    on: Machine, ranks_per_node: int, kind: str, size: int, stride: int, sent: float
) -> float:
    """Return the time of one collective.

    Rings for all-gather and reduce-scatter, which pass (n - 1) / n of the whole on every link; an
    all-reduce is one after the other (Thakur, Rabenseifner and Gropp, 2005). A ring that leaves its
    node has as many links to do so as it has ranks there. Latency counts log2(n) times, as trees
    have it.

    Args:
        on: the machine.
        ranks_per_node: ranks that share a node.
        kind: "all-gather", "reduce-scatter", "all-reduce", "all-to-all" or "send".
        size: ranks that take part, n.
        stride: distance between neighbours among them.
        sent: bytes of the whole tensor; of an all-to-all what one rank sends, to itself too.
    """
    here = min(size, max(1, ranks_per_node // stride))
    crosses = here < size
    tier = on.network if crosses else on.node
    if kind == "send":
        # To a stage that is stride ranks away.
        tier = on.network if stride >= ranks_per_node else on.node
        return tier.latency + sent / tier.rate
    rounds = ceil(log2(size)) * tier.latency
    if kind == "all-to-all":
        inside = sent * (here - 1) / size / on.node.rate
        outside = sent * (size - here) / size / on.network.rate
        return rounds + max(inside, outside)
    passed = sent * (size - 1) / size
    rate = min(on.node.rate, here * on.network.rate) if crosses else on.node.rate
    return (2 if kind == "all-reduce" else 1) * (rounds + passed / rate)


def tier_in_words(ranks_per_node: int, size: int, stride: int) -> str:
    """Return where a group's bytes go: "between nodes" or "within a node"."""
    return "between nodes" if size * stride > ranks_per_node else "within a node"
