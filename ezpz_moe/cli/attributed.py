"""The table of ``ezpz-moe analyze --attribute``: the experts that have most of a text, by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ezpz_moe.config.train_only import DEFAULT_SHARE, fewest


def attributed_rows(experts: Sequence[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Yield a row for each layer: what ``[train_only]`` takes of it, by default."""
    for layer, group in groupby(experts, key=lambda each: each["layer"]):
        of_layer = list(group)
        shares = {each["expert"]: each["share_of_tokens"] for each in of_layer}
        chosen = fewest(shares, DEFAULT_SHARE)
        most = [each for each in of_layer if each["expert"] in chosen]
        row = {
            "layer": str(layer),
            "experts": f"{len(chosen)} of {len(of_layer)}",
            "which": ", ".join(map(str, chosen)),
            "of tokens": _sum(most, "share_of_tokens"),
            "of weight": _sum(most, "share_of_weight"),
        }
        if most[0]["against"]:
            others = [each["against"] for each in most]
            row |= {
                "of other tokens": _sum(others, "share_of_tokens"),
                "of other weight": _sum(others, "share_of_weight"),
            }
        yield row


def _sum(shares: Sequence[dict[str, Any]], name: str) -> str:
    return f"{sum(each[name] for each in shares):.1%}"
