"""All measures of a recording, layer by layer. Suffixes: as in :mod:`.record`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ezpz_moe.tools.analysis import consistency, drops, similarity
from ezpz_moe.tools.analysis.drift import Drift, drift
from ezpz_moe.tools.analysis.tokens import Explained, concentration, explained_by_token, top_tokens

if TYPE_CHECKING:
    from ezpz_moe.tools.analysis.record import Recording, Routing

_TOP_TOKENS = 5
_PARTS = 8


@dataclass(frozen=True)
class Settings:
    """What the measures depend on.

    Attributes:
        capacity_factor: for counting drops.
        segment: m, tokens per segment.
        cache: how many experts the cache holds, as a multiple of the experts that a token uses.
    """

    capacity_factor: float = 1.25
    segment: int = 16
    cache: float = 2.0


@dataclass(frozen=True)
class LayerReport:
    """One layer's measures; see the modules that compute them.

    Attributes:
        top_k: experts of a token; their mean number where it differs.
        load: share of all choices that each expert got.
        explained: None if no token ID occurs twice.
        concentration: of each expert's tokens; None for an expert without any.
        top_tokens: each expert's most frequent token IDs, with their share of its tokens.
        dropped: share of the choices beyond the capacity.
        dropped_by_position: the same in eight equal stretches of the sequence.
        srp, sch: segment routing best performance; hit rate of a cache of ``cache_size`` experts.
        sch_by_size: hit rates of caches of 1 to E experts.
        cosines: between the experts' weights; NaN for an expert whose weights are all zero.
        mean_cosine, max_cosine: over the pairs of experts that have a cosine; None without any.
        drift: compared with the other checkpoint.
    """

    layer: str
    num_experts: int
    top_k: float
    load: list[float]
    explained: Explained | None
    concentration: list[float | None]
    top_tokens: list[list[tuple[int, float]]]
    dropped: float
    dropped_by_position: list[float]
    srp: float
    sch: float
    cache_size: int
    sch_by_size: list[float]
    cosines: list[list[float]]
    mean_cosine: float | None
    max_cosine: float | None
    drift: Drift | None = None


def report(
    recording: Recording,
    tokens_SL: torch.Tensor,
    settings: Settings,
    other: Recording | None = None,
) -> list[LayerReport]:
    """Return every layer's report, and what ``other`` routes differently on the same text."""
    others: Mapping[str, Routing] = other.routing if other else {}
    return [
        _layer(name, routing, others.get(name), recording.cosines[name], tokens_SL, settings)
        for name, routing in recording.routing.items()
    ]


def _layer(
    name: str,
    routing: Routing,
    other: Routing | None,
    cosines_EE: torch.Tensor,
    tokens_SL: torch.Tensor,
    settings: Settings,
) -> LayerReport:
    ids_SLK, E = routing.ids_SLK, routing.num_experts
    ids_TK, tokens_T = ids_SLK.flatten(0, 1), tokens_SL.flatten()
    chosen_SLK = ids_SLK < E
    # Where tokens use different numbers of experts, their mean.
    choices, tokens = int(chosen_SLK.sum()), len(ids_TK)
    top_k = round(choices / tokens, 2) if choices % tokens else choices // tokens
    dropped_SLK = drops.dropped(ids_SLK, E, settings.capacity_factor)
    counts_NE = consistency.segment_counts(ids_SLK, E, settings.segment)
    hit_rates = consistency.best_hit_rates(counts_NE).tolist()
    cache_size = min(E, max(1, round(settings.cache * top_k)))
    pairs = similarity.off_diagonal(cosines_EE)
    # An expert whose weights are all zero has no cosine.
    pairs = pairs[~pairs.isnan()]
    return LayerReport(
        layer=name,
        num_experts=E,
        top_k=top_k,
        load=(torch.bincount(ids_SLK[chosen_SLK], minlength=E) / chosen_SLK.sum()).tolist(),
        explained=_explained(ids_TK, tokens_T, E),
        concentration=[
            # Only NaN differs from itself.
            None if each != each else each
            for each in concentration(ids_TK, tokens_T, E).tolist()
        ],
        top_tokens=top_tokens(ids_TK, tokens_T, E, count=_TOP_TOKENS),
        dropped=drops.share(dropped_SLK, chosen_SLK).item(),
        dropped_by_position=drops.by_position(dropped_SLK, chosen_SLK, _PARTS).tolist(),
        srp=consistency.best_routing(counts_NE, settings.segment),
        sch=hit_rates[cache_size - 1],
        cache_size=cache_size,
        sch_by_size=hit_rates,
        cosines=cosines_EE.tolist(),
        mean_cosine=pairs.mean().item() if len(pairs) else None,
        max_cosine=pairs.max().item() if len(pairs) else None,
        drift=None if other is None else drift(ids_TK, other.ids_SLK.flatten(0, 1), E),
    )


def _explained(ids_TK: torch.Tensor, tokens_T: torch.Tensor, num_experts: int) -> Explained | None:
    if int(torch.unique(tokens_T, return_counts=True)[1].max()) < 2:
        return None
    return explained_by_token(ids_TK, tokens_T, num_experts)
