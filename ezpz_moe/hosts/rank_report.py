"""What a host tells of one rank of a big run that it has built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankReport:
    """What one rank would hold.

    Attributes:
        rank: global rank.
        parameters: number of parameters in its shards; None, as the next two, after an error.
        state_bytes: weights, gradients and optimizer states in bytes; activations are not in it.
        step: what of a step was run with tensors that have no values, or why none was.
        error: what the rank met; empty when it was built.
        bytes_by_place: for ``describe``, bytes by (part of the model, component).
    """

    rank: int
    parameters: int | None = None
    state_bytes: int | None = None
    step: str | None = None
    error: str = ""
    bytes_by_place: Mapping[tuple[str, str], int] = field(default_factory=dict)
