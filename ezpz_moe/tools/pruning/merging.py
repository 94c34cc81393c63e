"""Add the weights of removed experts to the kept ones that are most like them.

A kept expert becomes the weighted mean of itself and of the removed experts that are nearest to it,
by the cosine of their weights. Hidden channels of a removed expert are first put in the order of
the kept one's: an FFN computes the same in any order of its channels, and a mean of two FFNs whose
channels do not correspond computes neither. Source: MC-SMoE, arXiv 2310.01334, which
solves the assignment of channels exactly; here it is the greedy one.

Legend: E = experts, F = hidden channels, C = all weights of one channel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_CHANNELS = {
    r"(w1_EFD|w3_EFD|b1_EF|b3_EF|w1|w3)": (1, 1),
    r"(w2_EDF|w2|mlp2_weight(_EDF)?|w2\.weight)": (2, 1),
    # Rows of gate and up in turn.
    r"(mlp1_weight(_EGD)?|mlp1_bias(_EG)?)": (1, 2),
    r"w13\.(weight|bias)": (2, 1),
}
"""Last part of a stack's name -> the dimension of its channels, and how many rows each has."""


@dataclass(frozen=True)
class Merged:
    """A removed expert, and where it goes.

    Attributes:
        expert: its number.
        into: the kept one's.
        share: of the mean; the kept one has what the shares of all that go into it leave.
        order: the removed one's channel for each of the kept one's; None until it is known.
    """

    expert: int
    into: int
    share: float
    order: torch.Tensor | None = None


def where_to(
    kept: Sequence[int], cosines_EE: torch.Tensor, amounts_E: Sequence[float]
) -> list[Merged]:
    """Return into which kept expert each removed one goes, and with which share.

    Args:
        kept: numbers of those that stay.
        cosines_EE: between the experts' weights.
        amounts_E: each expert's part of a mean, such as its share of a text's tokens. A removed
            expert of which no token of the text had need adds nothing.
    """
    removed = [e for e in range(len(amounts_E)) if e not in set(kept)]
    # A NaN is of an expert without weights: it is as near to any as to another.
    alike = cosines_EE[:, list(kept)].nan_to_num(nan=-1.0)
    into = {e: kept[int(alike[e].argmax())] for e in removed}
    totals = {k: amounts_E[k] + sum(amounts_E[e] for e in removed if into[e] == k) for k in kept}
    shares = {e: amounts_E[e] / totals[into[e]] if totals[into[e]] else 0.0 for e in removed}
    return [Merged(e, into[e], shares[e]) for e in removed if shares[e]]


def channels(stack: torch.Tensor, name: str, expert: int) -> torch.Tensor | None:
    """Return one expert's rows of a stack by channel, [F, C] in float32; None without channels."""
    if (place := _place(name)) is None:
        return None
    dim, rows = place
    return stack[expert].float().movedim(dim - 1, 0).unflatten(0, (-1, rows)).flatten(1)


def similar_channels(stacks: Mapping[str, torch.Tensor], pair: Merged) -> torch.Tensor:
    """Return the products of two experts' channels, [F, F], added up over some stacks."""
    total = torch.zeros(())
    for name, stack in stacks.items():
        of_kept = channels(stack, name, pair.into)
        of_removed = channels(stack, name, pair.expert)
        if of_kept is not None and of_removed is not None:
            total = total + of_kept @ of_removed.T
    return total


def greedy_order(similar_FF: torch.Tensor) -> torch.Tensor:
    """Return for each row the column that it is matched with: the greatest of all first.

    Args:
        similar_FF: of finite numbers.

    Returns:
        A permutation of the columns.
    """
    similar_FF = similar_FF.clone()
    order_F = torch.full((len(similar_FF),), -1)
    while (order_F < 0).any():
        # All pairs that are each other's greatest at once: the greatest of all is among them.
        column_F, row_F = similar_FF.argmax(1), similar_FF.argmax(0)
        rows = torch.arange(len(order_F))
        is_new_F = (row_F[column_F] == rows) & (order_F < 0)
        new, taken = rows[is_new_F], column_F[is_new_F]
        order_F[new] = taken
        similar_FF[new], similar_FF[:, taken] = -torch.inf, -torch.inf
    return order_F


def merge(stack: torch.Tensor, name: str, pairs: Sequence[Merged]) -> torch.Tensor:
    """Return a stack of E experts in which the kept ones are the means, in its dtype.

    Args:
        stack: [E, ...].
        name: the tensor's, which says where its channels are.
        pairs: with their orders.
    """
    result = stack.clone()
    for into in {each.into for each in pairs}:
        of_kept = [each for each in pairs if each.into == into]
        mean = stack[into].double() * (1 - sum(each.share for each in of_kept))
        for each in of_kept:
            mean += each.share * _in_order(stack[each.expert], name, each.order).double()
        result[into] = mean.to(stack.dtype)
    return result


def _in_order(expert: torch.Tensor, name: str, order_F: torch.Tensor | None) -> torch.Tensor:
    """Return one expert's part of a stack with its channels in another order."""
    if order_F is None or (place := _place(name)) is None:
        return expert
    dim, rows = place
    index = (order_F[:, None] * rows + torch.arange(rows)).flatten()
    return expert.index_select(dim - 1, index)


def _place(name: str) -> tuple[int, int] | None:
    for pattern, place in _CHANNELS.items():
        if re.search(rf"(^|\.){pattern}$", name):
            return place
    return None
