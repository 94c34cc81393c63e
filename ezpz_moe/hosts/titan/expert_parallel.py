"""The routed layer as one node under expert parallelism: a token goes once to each rank.

The host's dispatcher sends a row for every choice of a token, gets as many rows back, and weights
them, for which autograd keeps them in float32. Here a token goes once to every rank that has
experts of its, together with its choices and their scores. That rank's backend dispatches, computes
and adds up as it does without expert parallelism, and sends one row per token back. What is sent
shrinks by the number of a token's experts that share a rank, and so does what backward needs of it;
no output of an expert is kept.

Who sends how much to whom goes through the host's dispatcher: its mesh, its collectives, its
splits.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract` and :mod:`ezpz_moe.compute.sending`;
e = experts of this rank, U = tokens received.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import spmd_types as spmd
import torch
from torch import Tensor

from ezpz_moe.compute.sending import goes_to, ids_of_rank, rows_of, sum_of, tokens_sent

OnRank = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""``(x_UD, scores_UK, ids_UK, counts_e, num_rows) -> out_UD``: the layer with this rank's experts,
whose ids are the lowest; ``num_rows`` as for :meth:`.Backend.routed`."""


class Dispatcher(Protocol):
    """What is asked of the host's ``AllToAllTokenDispatcher``: its mesh and its collectives."""

    ep_mesh: Any

    def _token_count_exchange(self, counts: Tensor, pg: Any, ep_size: int, /) -> Tensor: ...

    def _dispatch_token_exchange(
        self, rows: Tensor, /, pg: Any, output_splits: list[int], input_splits: list[int]
    ) -> Tensor: ...

    def _combine_token_exchange(
        self, rows: Tensor, /, pg: Any, input_splits: list[int], output_splits: list[int]
    ) -> Tensor: ...


class _Traffic(NamedTuple):
    """What this rank sends to each rank, and gets from each."""

    token_S: Tensor
    sent_P: list[int]
    received_P: list[int]
    counts_e: Tensor
    num_rows: int


def across_ranks(
    dispatcher: Dispatcher,
    on_rank: OnRank,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
) -> Tensor:
    """Compute the routed layer of this rank's tokens with the experts of all ranks.

    Args:
        dispatcher: the host's, with its mesh.
        on_rank: computes the tokens that this rank gets.
        x_TD, scores_TK, ids_TK: as for :meth:`.Backend.routed`; ids of no expert go nowhere.
        counts_E: int64, how often each expert of any rank is among the ids.

    Returns:
        out_TD in x's dtype. Device syncs: one, for the sizes of what is sent and received, beside
        those of the backend. Collectives: five, of which two carry rows.
    """
    # The host's type checker knows none of what is done here; out's type is that of the tokens.
    with spmd.no_typecheck():
        out_TD = _across_ranks(dispatcher, on_rank, x_TD, scores_TK, ids_TK, counts_E)
    if spmd.is_type_checking():
        spmd.assert_type_like(out_TD, x_TD)
    return out_TD


def _across_ranks(
    dispatcher: Dispatcher,
    on_rank: OnRank,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
) -> Tensor:
    ranks, group = dispatcher.ep_mesh.size(), dispatcher.ep_mesh.get_group()
    num_experts = counts_E.shape[0] // ranks
    traffic = _traffic(dispatcher, ids_TK, counts_E, num_experts)
    send = partial(
        dispatcher._dispatch_token_exchange,
        pg=group,
        output_splits=traffic.received_P,
        input_splits=traffic.sent_P,
    )
    x_UD, scores_UK = (send(rows_of(each, traffic.token_S)) for each in (x_TD, scores_TK))
    ids_UK = send(ids_TK.index_select(0, traffic.token_S))
    ids_UK = ids_of_rank(ids_UK, num_experts, dispatcher.ep_mesh.get_local_rank())
    out_UD = on_rank(x_UD, scores_UK, ids_UK, traffic.counts_e, traffic.num_rows)
    out_SD = dispatcher._combine_token_exchange(
        out_UD, group, input_splits=traffic.sent_P, output_splits=traffic.received_P
    )
    return sum_of(out_SD, traffic.token_S, x_TD.shape[0])


@torch.no_grad()
def _traffic(
    dispatcher: Dispatcher, ids_TK: Tensor, counts_E: Tensor, num_experts: int
) -> _Traffic:
    ranks, group = dispatcher.ep_mesh.size(), dispatcher.ep_mesh.get_group()
    goes_PT = goes_to(ids_TK, num_experts, ranks)
    tokens_P = goes_PT.sum(1)
    # How many rows each expert gets, and behind them how many tokens that is.
    told_PX = torch.cat([counts_E.view(ranks, -1), tokens_P.unsqueeze(1)], 1)
    heard_PX = dispatcher._token_count_exchange(told_PX.flatten(), group, ranks)
    counts_e = heard_PX[:, :-1].sum(0)
    sizes = torch.cat([tokens_P, heard_PX[:, -1], counts_e.sum().unsqueeze(0)]).tolist()
    sent_P, received_P, num_rows = sizes[:ranks], sizes[ranks:-1], sizes[-1]
    # torch.compile does not know them while it traces, but has to know that what is checked of
    # them later passes.
    torch._check(num_rows >= 0)
    torch._check(num_rows <= sum(received_P) * ids_TK.shape[1])
    return _Traffic(tokens_sent(goes_PT, sum(sent_P)), sent_P, received_P, counts_e, num_rows)
