"""Which tokens go to which rank, and their rows on the way there and back, both differentiable.

With expert parallelism a rank has some of the experts. A token goes once to every rank that has
experts of its, whatever number of them: there it is dispatched, and what comes back is the sum of
what these experts return.

Legend of the suffixes: :mod:`.contract`. P = ranks; S = tokens sent, each counted once for every
rank that it goes to; X = any size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.dispatch import sum_by_token


def goes_to(ids_TK: Tensor, experts_of_rank: int, ranks: int) -> Tensor:
    """Return goes_PT, bool: whether the rank has an expert of the token.

    Args:
        ids_TK: every token's experts, integer. Ids beyond all ranks' experts go to no rank.
        experts_of_rank: so many neighbours each rank has.
        ranks: P.
    """
    rank_KT = (ids_TK // experts_of_rank).clamp(max=ranks).t()
    goes_PT = torch.zeros(ranks + 1, ids_TK.shape[0], dtype=torch.bool, device=ids_TK.device)
    return goes_PT.scatter_(0, rank_KT, True)[:ranks]


def tokens_sent(goes_PT: Tensor, num_sent: int) -> Tensor:
    """Return token_S, int64: the tokens of the first rank, then of the next, each in their order.

    Args:
        goes_PT: of :func:`goes_to`.
        num_sent: S, the sum of ``goes_PT``. Given, so that no device has to be asked.
    """
    return torch.nonzero_static(goes_PT, size=num_sent)[:, 1]


def ids_of_rank(ids_TK: Tensor, experts_of_rank: int, rank: int) -> Tensor:
    """Return the ids as this rank counts its experts; experts of others get the id after them."""
    own_TK = ids_TK - rank * experts_of_rank
    is_own_TK = (own_TK >= 0) & (own_TK < experts_of_rank)
    return torch.where(is_own_TK, own_TK, experts_of_rank)


def rows_of(tokens_TX: Tensor, token_S: Tensor) -> Tensor:
    """Return rows_SX. The gradient is :func:`sum_of`: in one rounding, without atomics."""
    return _Rows.apply(tokens_TX, token_S)


def sum_of(rows_SX: Tensor, token_S: Tensor, num_tokens: int) -> Tensor:
    """Return tokens_TX, differentiable: each token's rows added up as by :func:`.sum_by_token`."""
    return _Sum.apply(rows_SX, token_S, num_tokens)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_TX: Tensor, token_S: Tensor) -> Tensor:
        ctx.save_for_backward(token_S)
        ctx.num_tokens = tokens_TX.shape[0]
        return tokens_TX.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (token_S,) = ctx.saved_tensors
        return sum_by_token(grads[0], token_S, ctx.num_tokens), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SX: Tensor, token_S: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(token_S)
        return sum_by_token(rows_SX, token_S, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_S,) = ctx.saved_tensors
        return grads[0].index_select(0, token_S), None, None
