"""How much more the busiest rank's experts get than the mean: the load that a plan assumes.

Legend: E = routed experts, P = ranks that share them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.json_lines import read
from ezpz_moe.telemetry.where import find_records

BALANCED, ZIPF = "balanced", "zipf1"

_DRAWS = 256
"""Orders of the experts that a mean is taken over: it is then known to a percent or two."""

Loads = Sequence[Sequence[float]]
"""Of each layer, how much each expert gets, in any unit."""


def loads(load: str) -> Loads | None:
    """Return the loads of a recorded run; None for the distributions by name.

    Args:
        load: "balanced", "zipf1", or a run's folder, records or job.

    Raises:
        EzpzError: it is none of these, or has no records.
    """
    if load in (BALANCED, ZIPF):
        return None
    if not Path(load).exists():
        raise EzpzError(
            f"--load {load}: is neither {BALANCED} nor {ZIPF}, and there is no such run. Name a "
            "run's dump_folder, or its telemetry.jsonl."
        )
    records = read(source := find_records(Path(load)))
    if not records:
        raise EzpzError(
            f"--load {load}: {source} holds no records yet: the run stopped or is still before its "
            "first one."
        )
    # The last one: what the routers have learned by then is what a run goes on with.
    return [layer.counts_E for layer in records[-1].layers]


def rank_imbalance(load: str, known: Loads | None, num_experts: int, ranks: int) -> float:
    """Return the rows of the busiest rank over the mean of the ranks, expected; 1 is even.

    Args:
        load: as given to :func:`loads`.
        known: what that returned.
        num_experts: E of a layer.
        ranks: P, which divides E; neighbours among the experts share a rank.

    Raises:
        EzpzError: the run had another number of experts.
    """
    if ranks == 1 or load == BALANCED:
        return 1.0
    if known is None:
        return zipf_imbalance(num_experts, ranks)
    # Layers of one model may have different numbers of experts.
    if not (alike := [each for each in known if len(each) == num_experts]):
        had = ", ".join(map(str, sorted({len(each) for each in known}))) or "no"
        raise EzpzError(
            f"--load {load}: the run had {had} experts in a layer, and this model has "
            f"{num_experts}."
        )
    return fmean(max_over_mean(each, ranks) for each in alike)


def zipf_imbalance(num_experts: int, ranks: int) -> float:
    """Return the expected imbalance if the n-th busiest expert gets a load of 1 / n.

    Which experts share a rank is chance, so this is a mean over orders, the same in every call.
    """
    draw = random.Random(0)
    loads_E = [1 / n for n in range(1, num_experts + 1)]
    found = []
    for _ in range(_DRAWS):
        draw.shuffle(loads_E)
        found.append(max_over_mean(loads_E, ranks))
    return fmean(found)


def max_over_mean(loads_E: Sequence[float], ranks: int) -> float:
    """Return the load of the busiest rank over the mean; 1 if nothing was assigned."""
    size = len(loads_E) // ranks
    of_ranks_P = [sum(loads_E[rank * size : (rank + 1) * size]) for rank in range(ranks)]
    return max(of_ranks_P) * ranks / sum(of_ranks_P) if sum(of_ranks_P) else 1.0


def distinct_ranks(num_experts: int, top_k: float, ranks: int) -> float:
    """Return on how many ranks a token's experts are, expected, if all choices are as likely.

    A rank has none of them with the chance that K draws without putting back miss its E / P.
    """
    missed, own = 1.0, num_experts // ranks
    for drawn in range(int(top_k)):
        missed *= max(0, num_experts - own - drawn) / (num_experts - drawn)
    return ranks * (1 - missed)
