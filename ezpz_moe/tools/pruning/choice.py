"""Which experts of a layer stay. Legend: E = its routed experts, N = those that stay."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def most_important(amounts_E: Sequence[float], keep: int, groups: int = 1) -> list[int]:
    """Return the numbers of the N experts that have most, ascending; of equal ones the first.

    Args:
        amounts_E: what each expert has, such as its share of a text's tokens.
        keep: N.
        groups: of how many groups of neighbours equally many stay.
    """
    size, kept = len(amounts_E) // groups, []
    for first in range(0, len(amounts_E), size):
        # sorted() keeps the order of equal ones.
        by_amount = sorted(range(first, first + size), key=lambda e: -amounts_E[e])
        kept += by_amount[: keep // groups]
    return sorted(kept)


def least_alike(cosines_EE: torch.Tensor, keep: int, groups: int = 1) -> list[int]:
    """Return the numbers of the N experts that stay if one of the two most alike goes, repeatedly.

    Of the two, the one goes whose cosines with all others that are left have the greater sum; of
    equal ones, the one with the higher number. An expert without a cosine, whose weights are all
    zero, goes first.

    Args:
        cosines_EE: between the experts' weights, symmetric.
        keep: N.
        groups: as in :func:`most_important`; both of a pair are then of one group.
    """
    alike_EE = cosines_EE.double().nan_to_num(nan=2.0)
    E = len(alike_EE)
    of_group_E = torch.arange(E) // (E // groups)
    is_pair_EE = (of_group_E[:, None] == of_group_E).triu(1)
    stays_E, left_G = torch.ones(E, dtype=torch.bool), torch.full((groups,), E // groups)
    while int(stays_E.sum()) > keep:
        is_full_E = (left_G > keep // groups)[of_group_E]
        may_go_EE = is_pair_EE & stays_E & stays_E[:, None] & is_full_E
        place = int(alike_EE.masked_fill(~may_go_EE, -torch.inf).argmax())
        first, second = divmod(place, E)
        sums_E = alike_EE[:, stays_E].sum(1)
        goes = first if sums_E[first] > sums_E[second] else second
        stays_E[goes] = False
        left_G[of_group_E[goes]] -= 1
    return stays_E.nonzero().flatten().tolist()
