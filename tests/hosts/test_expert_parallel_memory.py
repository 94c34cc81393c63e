"""The routed layer across ranks: what it computes, sends, and keeps for backward.

The ranks are threads of this process, so that float64 on any number of them costs nothing; real
processes and the real trainer are in ``test_parallel.py``.
"""

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from dialect import ON_0_2, SINCE_2026_09
from torch import Tensor
from torch.nn.functional import silu

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.reference import relative_error
from ezpz_moe.compute.sending import goes_to, tokens_sent

if ON_0_2 or SINCE_2026_09:
    pytest.skip("this host's routed layers stay composed", allow_module_level=True)

from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from ezpz_moe.hosts.titan.expert_parallel import across_ranks

E, K, D, F, T = 8, 5, 16, 24, 30
NOWHERE = E + 3
"""An id that no expert has, as padding gets it."""


class Threads:
    """All-to-all between ranks that are threads."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=60)
        self._sent: list[tuple[Tensor, ...]] = [()] * ranks

    def exchange(self, rank: int, rows_SX: Tensor, splits: list[int]) -> Tensor:
        self._sent[rank] = rows_SX.split(splits)
        self._barrier.wait()
        received_UX = torch.cat([of_rank[rank] for of_rank in self._sent])
        self._barrier.wait()  # before a faster rank sends something else
        return received_UX

    def run(self, of_rank: Callable[[int], object]) -> list:
        results: list = [None] * self.ranks

        def run(rank: int) -> None:
            try:
                results[rank] = of_rank(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.ranks)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        broken = [each for each in results if isinstance(each, BaseException)]
        for each in sorted(broken, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise each
        return results


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_SX, threads, rank, received_P, sent_P):
        ctx.threads, ctx.rank, ctx.received_P, ctx.sent_P = threads, rank, received_P, sent_P
        return threads.exchange(rank, rows_SX, sent_P)

    @staticmethod
    def backward(ctx, grad_UX):
        grad_SX = ctx.threads.exchange(ctx.rank, grad_UX, ctx.received_P)
        return grad_SX, None, None, None, None


class Dispatcher(AllToAllTokenDispatcher):
    """The host's, with its collectives between threads; it counts the rows that forward sends."""

    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(AllToAllTokenDispatcher.Config(num_experts=E, top_k=K))
        self.ep_mesh = SimpleNamespace(
            size=lambda: threads.ranks, get_group=lambda: "group", get_local_rank=lambda: rank
        )
        self.threads, self.rank, self.rows_sent = threads, rank, 0

    def _token_count_exchange(self, counts_X, pg, ranks):
        counts_PX = counts_X.view(ranks, -1)
        return self.threads.exchange(self.rank, counts_PX, [1] * ranks).view(ranks, -1)

    def _dispatch_token_exchange(self, routed_input_ND, pg, output_splits, input_splits):
        self.rows_sent += sum(input_splits) if routed_input_ND.shape[1:] == (D,) else 0
        splits = (list(output_splits), list(input_splits))
        return Exchange.apply(routed_input_ND, self.threads, self.rank, *splits)

    def _combine_token_exchange(self, routed_output_RD, pg, input_splits, output_splits):
        return self._dispatch_token_exchange(routed_output_RD, pg, input_splits, output_splits)


class Tokens(NamedTuple):
    x_TD: Tensor
    scores_TK: Tensor
    ids_TK: Tensor


def without_some(tokens: Tokens) -> Tokens:
    """Some choices of no expert, a token without any, and one expert chosen twice."""
    tokens.ids_TK[3:6, 1] = NOWHERE
    tokens.ids_TK[7] = NOWHERE
    tokens.ids_TK[8, 0] = tokens.ids_TK[8, 1]
    return tokens


def all_on(experts: list[int], tokens: Tokens) -> Tokens:
    return tokens._replace(ids_TK=torch.tensor(experts)[tokens.ids_TK % len(experts)])


def none(tokens: Tokens) -> Tokens:
    return Tokens(*(each[:0] for each in tokens))


ROUTINGS: dict[str, list[Callable[[Tokens], Tokens]]] = {
    "even": [lambda tokens: tokens],
    "choices without an expert": [without_some],
    "an idle rank": [partial(all_on, [0, 1, 7])],
    "a rank without tokens": [without_some, none],
}
"""Name -> what is done to the tokens of each rank; the last one also to those of further ranks."""


def tokens_of(rank: int, routing: str, dtype: torch.dtype) -> Tokens:
    draw = torch.Generator().manual_seed(rank)
    x_TD, scores_TK = (torch.randn(T, X, generator=draw).to(dtype) for X in (D, K))
    ids_TK = torch.rand(T, E, generator=draw).argsort(-1)[:, :K]
    changes = ROUTINGS[routing]
    x_TD, scores_TK, ids_TK = changes[min(rank, len(changes) - 1)](Tokens(x_TD, scores_TK, ids_TK))
    return Tokens(x_TD.requires_grad_(), scores_TK.requires_grad_(), ids_TK)


def weights(dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(99)
    shapes = ((E, F, D), (E, D, F), (E, F, D))
    return [(torch.randn(each, generator=draw) * each[-1] ** -0.5).to(dtype) for each in shapes]


def counts(ids_TK: Tensor) -> Tensor:
    return torch.bincount(ids_TK[ids_TK < E], minlength=E)


def grad_out(rank: int, x_TD: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(50 + rank)
    return torch.randn(x_TD.shape, generator=draw).to(x_TD.dtype)


def of_one_rank(rank: int, threads: Threads, routing: str, dtype: torch.dtype) -> dict:
    tokens, own = tokens_of(rank, routing, dtype), E // threads.ranks
    mine = [each[rank * own :][:own].clone().requires_grad_() for each in weights(dtype)]
    backend, dispatcher = get_backend("for_loop"), Dispatcher(threads, rank)

    def on_rank(x_UD, scores_UK, ids_UK, counts_e, num_rows):
        return backend.routed(*mine, x_UD, scores_UK, ids_UK, counts_e, num_rows=num_rows)

    out_TD = across_ranks(dispatcher, on_rank, *tokens, counts(tokens.ids_TK))
    out_TD.backward(grad_out(rank, tokens.x_TD))
    names = ("out", "x", "scores", "w1", "w2", "w3")
    given = (tokens.x_TD, tokens.scores_TK, *mine)
    computed = (out_TD.detach(), *(each.grad for each in given))
    return dict(zip(names, computed, strict=True)) | {"rows_sent": dispatcher.rows_sent}


def on_a_blackboard(ranks: int, routing: str) -> list[dict[str, Tensor]]:
    """What each rank is to compute, in float64."""
    everything = [each.requires_grad_() for each in weights(torch.float64)]
    results = []
    for rank in range(ranks):
        x_TD, scores_TK, ids_TK = tokens_of(rank, routing, torch.float64)
        out_TD = torch.zeros_like(x_TD)
        for expert, (w1_FD, w2_DF, w3_FD) in enumerate(zip(*everything, strict=True)):
            score_T1 = (scores_TK * (ids_TK == expert)).sum(-1, keepdim=True)
            out_TD = out_TD + score_T1 * ((silu(x_TD @ w1_FD.T) * (x_TD @ w3_FD.T)) @ w2_DF.T)
        out_TD.backward(grad_out(rank, x_TD))
        results.append({"out": out_TD.detach(), "x": x_TD.grad, "scores": scores_TK.grad})
    shards = [each.grad.chunk(ranks) for each in everything]
    for rank, result in enumerate(results):
        result |= {f"w{i + 1}": shard[rank] for i, shard in enumerate(shards)}
    return results


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_output_and_gradients_are_those_of_one_rank(routing, ranks):
    """In float64 what remains is the order of sums: of at most 4 ranks' rows per expert."""
    threads = Threads(ranks)
    computed = threads.run(lambda rank: of_one_rank(rank, threads, routing, torch.float64))
    for ours, true in zip(computed, on_a_blackboard(ranks, routing), strict=True):
        for name, value in true.items():
            assert relative_error(ours[name], value) <= 4 * T * 2.0**-53, name


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_token_goes_once_to_a_rank_and_comes_back(routing):
    threads = Threads(4)
    computed = threads.run(lambda rank: of_one_rank(rank, threads, routing, torch.float32))
    pairs = 0
    for rank in range(threads.ranks):
        ids = tokens_of(rank, routing, torch.float32).ids_TK.tolist()
        pairs += sum(len({each // 2 for each in row if each < E}) for row in ids)
    assert sum(ours["rows_sent"] for ours in computed) == 2 * pairs


def test_what_is_kept_is_what_was_received_and_two_hidden():
    """On one rank, where no other thread allocates: tokens, gate and up, the order, the scores."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, all_weights = tokens_of(0, "even", torch.bfloat16), weights(torch.bfloat16)
    for each in all_weights:
        each.requires_grad_()

    def on_rank(x_UD, scores_UK, ids_UK, counts_e, num_rows):
        backend = get_backend("for_loop")
        return backend.routed(*all_weights, x_UD, scores_UK, ids_UK, counts_e, num_rows=num_rows)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = across_ranks(Dispatcher(Threads(1), 0), on_rank, *tokens, counts(tokens.ids_TK))
    known = {each.untyped_storage().data_ptr() for each in (*all_weights, *tokens, out)}
    R, half, whole = T * K, 2, 8
    tokens_received, hidden = T * D * half, 2 * R * F * half
    scores, order, sent, counted = T * K * half, R * whole, 2 * T * whole, E * whole
    expected = tokens_received + hidden + scores + order + sent + counted
    assert sum(nbytes for at, nbytes in saved.items() if at not in known) == expected


def test_tokens_are_sent_in_the_order_of_ranks_and_then_their_own():
    ids_TK = torch.tensor([[5, 0], [NOWHERE, 4], [1, 0], [NOWHERE, NOWHERE]])
    goes_PT = goes_to(ids_TK, experts_of_rank=4, ranks=2)
    assert goes_PT.tolist() == [[True, False, True, False], [True, True, False, False]]
    assert tokens_sent(goes_PT, num_sent=4).tolist() == [0, 2, 0, 1]
