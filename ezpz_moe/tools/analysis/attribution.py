"""What each expert has of a text: ESFT's two scores, arXiv 2407.01906, section 3.2.

Legend of the suffixes: as in :mod:`.record`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ezpz_moe.tools.analysis.record import Recording, Routing


@dataclass(frozen=True)
class Attributed:
    """What one expert has of a text.

    Attributes:
        layer, expert: their numbers in the model.
        share_of_tokens: of the layer's choices, each token's counting as one together.
        share_of_weight: of the weights that routers give to chosen experts.
        against: both shares of another text, if there is one.
    """

    layer: int
    expert: int
    share_of_tokens: float
    share_of_weight: float
    against: dict[str, float] | None = None


def attribution(recording: Recording, other: Recording | None = None) -> list[Attributed]:
    """Return what each expert has of a text, and of another one; in the model's order."""
    others: Mapping[str, Routing] = other.routing if other else {}
    found = []
    for name, routing in recording.routing.items():
        shares = _shares(routing)
        of_others = _shares(others[name]) if other else [None] * len(shares)
        layer = int(name.rpartition(".")[2])
        for expert, (of_text, against) in enumerate(zip(shares, of_others, strict=True)):
            found.append(Attributed(layer, expert, **of_text, against=against))
    return found


def _shares(routing: Routing) -> list[dict[str, float]]:
    E = routing.num_experts
    ids_TK, weights_TK = routing.ids_SLK.flatten(0, 1), routing.weights_SLK.flatten(0, 1).double()
    chosen_TK = ids_TK < E
    # A token's choices count as one together, however many it makes.
    of_token_TK = chosen_TK / chosen_TK.sum(1, keepdim=True).clamp(min=1).double()
    return [
        {"share_of_tokens": tokens, "share_of_weight": weight}
        for tokens, weight in zip(
            _by_expert(ids_TK, of_token_TK, E),
            _by_expert(ids_TK, weights_TK.where(chosen_TK, 0), E),
            strict=True,
        )
    ]


def _by_expert(ids_TK: torch.Tensor, amounts_TK: torch.Tensor, num_experts: int) -> list[float]:
    """Return each expert's part of all amounts; zeros where there are none."""
    # One place more, for choices of no expert.
    sums_F = torch.zeros(num_experts + 1, dtype=torch.float64)
    sums_F.index_add_(0, ids_TK.flatten().long(), amounts_TK.flatten())
    sums_E = sums_F[:num_experts]
    return (sums_E / sums_E.sum().clamp(min=torch.finfo(torch.float64).tiny)).tolist()
