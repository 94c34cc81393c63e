"""The measures of ``ezpz-moe analyze`` where tokens use different numbers of experts, or none.

Against sets of experts in plain Python. Legend of the suffixes: as in test_analysis_formulas.py;
here K = E, and the id E is that of no expert.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from ezpz_moe.tools.analysis import consistency, drift, drops, tokens
from ezpz_moe.tools.analysis.record import Recording, Routing
from ezpz_moe.tools.analysis.report import Settings, report

S, L, E = 3, 21, 5
EXACT = 1e-12


def routing(seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    is_used_SLE = torch.rand(S, L, E, generator=draw) < torch.linspace(0.1, 0.7, E)
    is_used_SLE[0, :3] = False
    ids_SLE = torch.where(is_used_SLE, torch.arange(E), E)
    return ids_SLE.sort(-1, descending=True).values  # in whatever order


def sets(ids_SLK: torch.Tensor) -> list[list[set[int]]]:
    return [[set(token) - {E} for token in sequence] for sequence in ids_SLK.tolist()]


@pytest.mark.parametrize("m", [1, 4])
def test_segments_count_the_experts_that_tokens_use(m):
    counts_NE = consistency.segment_counts(routing(), E, m)
    written = [
        Counter(itertools.chain(*sequence[start : start + m]))
        for sequence in sets(routing())
        for start in range(L - m + 1)
    ]
    assert counts_NE.tolist() == [[each[e] for e in range(E)] for each in written]
    total = sum(each.total() for each in written)
    hits = sum(n for each in written for _, n in each.most_common(2))
    assert consistency.best_hit_rates(counts_NE)[1].item() == pytest.approx(hits / total, abs=EXACT)
    assert m > 1 or consistency.best_routing(counts_NE, m) == 1


def test_a_token_is_told_as_many_experts_as_it_uses():
    ids_TK, tokens_T = routing().flatten(0, 1), torch.arange(S * L) % 4
    used, found = list(itertools.chain(*sets(routing()))), []
    for t, chosen in enumerate(used):
        counts = [sum(e in each for u, each in enumerate(used) if u != t) for e in range(E)]
        ways = list(itertools.combinations(range(E), len(chosen)))
        best = max(sum(counts[e] for e in way) for way in ways)
        likeliest = [way for way in ways if sum(counts[e] for e in way) == best]
        shares = [len(chosen & set(way)) / max(len(chosen), 1) for way in likeliest]
        found += [sum(shares) / len(shares)] if chosen else []
    said = tokens.explained_by_token(ids_TK, tokens_T, E)
    assert said.by_frequency == pytest.approx(sum(found) / len(found), abs=EXACT)


def test_no_expert_sees_the_tokens_that_use_none():
    ids_TK, tokens_T = routing().flatten(0, 1), torch.arange(S * L) % 4
    said_E = tokens.concentration(ids_TK, tokens_T, E)
    only_4 = torch.where(ids_TK == 4, 4, E)
    assert torch.equal(said_E[4:], tokens.concentration(only_4, tokens_T, E)[4:])
    assert tokens.concentration(only_4, tokens_T, E)[:4].isnan().all()


def test_drops_are_a_share_of_what_is_chosen():
    ids_SLK = routing()
    used = sets(ids_SLK)
    chosen = sum(len(each) for sequence in used for each in sequence)
    room = math.ceil(0.75 * L * chosen / (S * L) / E)
    queues = [Counter(itertools.chain(*sequence)) for sequence in used]
    expected = sum(max(0, n - room) for queue in queues for n in queue.values())
    said = drops.dropped(ids_SLK, E, 0.75)
    assert not said[ids_SLK == E].any()
    assert said.sum() == expected > 0
    share = drops.share(said, ids_SLK < E)
    assert share.item() == pytest.approx(expected / chosen, abs=EXACT)
    first, *_ = drops.by_position(said, ids_SLK < E, L)
    assert first == 0  # nobody's queue is full at once, and one token uses no expert


def test_drift_of_two_empty_sets_is_none():
    ids_TK, others_TK = (routing(seed).flatten(0, 1) for seed in (0, 1))
    pairs = list(zip(*(itertools.chain(*sets(routing(seed))) for seed in (0, 1)), strict=True))
    said = drift.drift(ids_TK, others_TK, E)
    both = [len(a & b) / len(a | b) if a | b else 1 for a, b in pairs]
    assert said.jaccard == pytest.approx(sum(both) / len(both), abs=EXACT)
    assert said.changed == sum(a != b for a, b in pairs) / len(pairs)


def test_a_report_has_the_mean_number_of_experts():
    ids_SLK = routing()
    recording = Recording(
        1.0,
        {"layers.1": Routing(ids_SLK, E, torch.ones(ids_SLK.shape))},
        {"layers.1": torch.eye(E)},
    )
    (layer,) = report(recording, torch.arange(S * L).view(S, L) % 4, Settings(segment=4))
    chosen = [each for sequence in sets(ids_SLK) for each in sequence]
    mean = sum(map(len, chosen)) / len(chosen)
    assert layer.top_k == round(mean, 2)
    assert layer.cache_size == round(2 * layer.top_k) < E
    counts = Counter(itertools.chain(*chosen))
    total = counts.total()
    assert layer.load == pytest.approx([counts[e] / total for e in range(E)], rel=1e-6)
