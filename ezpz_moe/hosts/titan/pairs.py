"""Experts that one token chooses together, as a record has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ezpz_moe.routing.choices import top_pairs


@torch.no_grad()
def taken_pairs(routers: Sequence[Any], meshes: Sequence[Any], most: int) -> list[dict[str, Any]]:
    """Return of each layer the record's fields of its sample, of all ranks; reset the counters.

    Without fields if no router samples.

    Args:
        routers: this rank's.
        meshes: over which counters add up to those of all tokens. Collective.
        most: pairs of a layer.
    """
    if not most:
        return [{}] * len(routers)
    for router in routers:
        for mesh in meshes:
            # Layer by layer: a matrix of all pairs is large.
            for each in (router.pairs_EE, router.sampled_1):
                torch.distributed.all_reduce(each, group=mesh.get_group())
    fields: list[dict[str, Any]] = [
        {"pairs": top_pairs(router.pairs_EE, most), "sampled_tokens": int(router.sampled_1)}
        for router in routers
    ]
    for router in routers:
        router.pairs_EE.zero_()
        router.sampled_1.zero_()
    return fields
