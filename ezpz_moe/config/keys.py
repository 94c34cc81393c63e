"""A key of a job's TOML: what it may hold and where the trainer keeps it. A row of a host's table.

Each host has such a table, ``Host.job_keys()``. Its rows are made by

- ``to(path, type)``: the same setting in the trainer's config, at ``path``;
- ``new(path, type)``: a setting that torchtitan 0.2 does not have;
- ``own(type)``: read by this package;
- ``gone(message)``: the host has no such setting; the message says why and what to do instead.

Types are checked strictly: ``true`` is not an integer, ``1`` is a float, ``"1"`` is neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Le, Lt
from pydantic import StringConstraints


@dataclass(frozen=True)
class Key:
    """One row of the table.

    Attributes:
        type: what the TOML may hold; None for a key that is gone.
        path: dotted path in the trainer's config; None when no single field takes the value
            unchanged.
        message: for a key that is gone, the error's text.
        unless: values of a key that is gone which are accepted without effect.
        since_0_3: torchtitan 0.2 does not have the key.
        is_file: the value names an existing file or folder (see ``Job.resolve``).
        flag: for a key that this package reads, the host's flag for the same, if any.
    """

    type: Any = None
    path: str | None = None
    message: str = ""
    unless: tuple[Any, ...] = ()
    since_0_3: bool = False
    is_file: bool = False
    flag: str | None = None


Keys: TypeAlias = Mapping[str, Mapping[str, Key]]
"""Section -> key -> its row."""


def to(path: str, type: Any, *, is_file: bool = False) -> Key:
    """Make a key for the same setting at ``path`` in the trainer's config."""
    return Key(type=type, path=path, is_file=is_file)


def new(path: str, type: Any) -> Key:
    """Make a key for a setting that torchtitan 0.2 does not have."""
    return Key(type=type, path=path, since_0_3=True)


def own(type: Any, *, flag: str | None = None, since_0_3: bool = False) -> Key:
    """Make a key that this package reads; ``flag`` is the host's for the same, if it has one."""
    return Key(type=type, flag=flag, since_0_3=since_0_3)


def gone(message: str, *, unless: tuple[Any, ...] = ()) -> Key:
    """Make a key that the host no longer has; ``unless`` lists values that ask for its behaviour.

    Those are accepted, so one file can serve several generations of the host.
    """
    return Key(message=message, unless=unless)


def sections(keys: Keys) -> set[str]:
    """Return all sections: "quantize.linear.mx" also adds "quantize.linear" and "quantize"."""
    return {
        ".".join(parts[: depth + 1])
        for parts in (name.split(".") for name in keys)
        for depth in range(len(parts))
    }


Positive = Annotated[int, Ge(1)]
NonNegative = Annotated[int, Ge(0)]
# -1 leaves the number to the host.
MinusOneOrPositive = Literal[-1] | Positive
Seconds = Annotated[int, Ge(1), Le(10**9)]
# What torch.manual_seed takes, without negative numbers, which it maps to large ones.
Seed = Annotated[int, Ge(0), Le(2**64 - 1)]
Rate = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
# Adam refuses 1: its means would stay at zero.
Beta = Annotated[float, Ge(0), Lt(1)]
Text = Annotated[str, StringConstraints(pattern=r"\A[^\x00]+\z")]  # no file name has a null
Dtype = Literal["bfloat16", "float32"]
CommBackend = Literal["standard", "deepep", "hybridep", "minimal_async_ep"]
