"""Write the tables of docs/reference/routing.md: what noise and padding do to the load.

    python scripts/make_routing_tables.py            rewrite the tables
    python scripts/make_routing_tables.py --check    exit with 1 if they are out of date

Random logits in place of a model: every expert's have a mean of its own, as in a router that
prefers some. The choices are those of training.
"""

from __future__ import annotations

import sys

import tables
import torch
import tyro
from torch import Tensor

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.routing.assignment import HostRules, chosen

T, E, K = 16384, 64, 8
SEED = 5
"""No printed number is so near to a rounding's border that another CPU would print another."""


def load_of(ids_TK: Tensor) -> Tensor:
    """Return load_E, float64: the assignments of every expert, over their mean."""
    load_E = ids_TK.flatten().bincount(minlength=E).double()
    return load_E / load_E.mean()


def choices(settings: Router, mask_T: Tensor) -> Tensor:
    """Return ids_TK, as a router of softmax scores chooses them."""
    draw = torch.Generator().manual_seed(SEED)
    liked_E = torch.randn(E, generator=draw)
    scores_TE = (torch.randn(T, E, generator=draw) + liked_E).softmax(-1)
    ids_TK = scores_TE.topk(K, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    rules = HostRules(norm=False, scale=1.0, limited=None)
    return chosen(weights_TK, ids_TK, scores_TE, mask_T, settings, rules, training=True)[1]


def noise() -> str:
    """The load of "balanced" with noise."""
    rows = []
    for value in (0.0, 0.1, 0.25, 0.5, 1.0):
        torch.manual_seed(SEED)
        settings = Router(routing="balanced", noise=value)
        load_E = load_of(choices(settings, torch.ones(T, dtype=torch.bool)))
        rows.append(
            {
                "`noise`": value,
                "load CV": f"{load_E.std(correction=0):.2f}",
                "busiest expert / mean": f"{load_E.max():.2f}",
            }
        )
    return tables.markdown(rows, right=rows[0])


def padding() -> str:
    """The load of "sinkhorn" with padding."""
    rows = []
    for share in (0.0, 0.25, 0.5, 0.75):
        mask_T = torch.arange(T) % 1024 < 1024 * (1 - share)  # the end of every sequence
        ids_TK = choices(Router(routing="sinkhorn"), mask_T)
        rows.append(
            {
                "padding": f"{share:.0%}",
                "busiest expert / mean, without padding": f"{load_of(ids_TK[mask_T]).max():.2f}",
                "with padding that is dispatched": f"{load_of(ids_TK).max():.2f}",
                "rows that padding adds": f"{len(mask_T) / int(mask_T.sum()) - 1:.0%}",
            }
        )
    return tables.markdown(rows, right=rows[0])


def main(check: bool = False) -> int:
    """Write the tables of routing.

    Args:
        check: write nothing; exit with 1 if a table is out of date.
    """
    made = {"noise": noise(), "padding": padding()}
    return tables.update("docs/reference/routing.md", made, check=check)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
