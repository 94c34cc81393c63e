"""Report on one rank of a big run, as built by a host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankReport:
    """What one rank would hold.

    Attributes:
        rank: global rank.
        parameters: number of parameters in its shards; None after an error, like the next two.
        state_bytes: bytes of weights, gradients and optimizer states, without activations.
        step: how much of a step ran with tensors that have no values, or why none did.
        error: what went wrong; empty if the rank was built.
        bytes_by_place: for ``describe``, bytes by (part of the model, component).
    """

    rank: int
    parameters: int | None = None
    state_bytes: int | None = None
    step: str | None = None
    error: str = ""
    bytes_by_place: Mapping[tuple[str, str], int] = field(default_factory=dict)
