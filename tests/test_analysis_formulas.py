"""The formulas of ``ezpz-moe analyze`` against written-out references, token by token, in Python.

Legend of the suffixes: T = tokens, K = experts of a token, E = experts, S, L = sequences and their
length.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch

from ezpz_moe.tools.analysis import consistency, drift, drops, similarity, tokens

E, K = 5, 2
EXACT = 1e-12  # some hundred float64 sums and products of numbers below 100


def routing(*shape: int, seed: int = 0, skew: float = 1.0) -> torch.Tensor:
    """Chosen experts, some more often than others."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, E, generator=draw) + skew * torch.arange(E) / E
    return logits.topk(K, dim=-1).indices


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(7, shape, generator=draw) * 100  # IDs have gaps


def overlap(counts: list[float], chosen: set[int]) -> float:
    """Mean over all ways of choosing K experts of largest count."""
    best = max(sum(counts[e] for e in each) for each in itertools.combinations(range(E), K))
    ways = [
        each for each in itertools.combinations(range(E), K) if sum(counts[e] for e in each) == best
    ]
    return sum(len(chosen & set(each)) / K for each in ways) / len(ways)


def test_a_tokens_experts_are_told_from_the_other_occurrences_of_its_id():
    ids_TK, tokens_T = routing(60), torch.cat([token_ids(59), torch.tensor([9])])
    sets, names = [set(each) for each in ids_TK.tolist()], tokens_T.tolist()
    by_token, by_frequency = [], []
    for t, (chosen, name) in enumerate(zip(sets, names, strict=True)):
        others = [u for u in range(60) if u != t]
        same = [u for u in others if names[u] == name]
        if not same:
            continue
        for found, among in ((by_token, same), (by_frequency, others)):
            found.append(overlap([sum(e in sets[u] for u in among) for e in range(E)], chosen))
    expected = (sum(by_token) / len(by_token), sum(by_frequency) / len(by_frequency))
    said = tokens.explained_by_token(ids_TK, tokens_T, E)
    assert (said.by_token, said.by_frequency) == pytest.approx(expected, abs=EXACT)
    assert said.share == pytest.approx((expected[0] - expected[1]) / (1 - expected[1]), abs=1e-11)
    assert said.tokens == 59


def test_an_id_that_decides_explains_all_and_chance_explains_nothing():
    tokens_T = token_ids(4000)
    by_id_TK = torch.stack([tokens_T // 100 % E, (tokens_T // 100 + 1) % E], dim=1)
    assert tokens.explained_by_token(by_id_TK, tokens_T, E).share == 1.0
    by_chance = tokens.explained_by_token(routing(4000, skew=0), tokens_T, E)
    # Each share is a mean of some 4000 overlaps with a deviation below 1/2.
    assert abs(by_chance.share) < 5 * 2 * 0.5 / 4000**0.5
    with pytest.raises(ValueError, match="twice"):
        tokens.explained_by_token(routing(5), torch.arange(5), E)


def shannon(counts) -> float:
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts if n)


def test_concentration_is_the_entropy_that_an_expert_does_not_see():
    ids_TK, tokens_T = routing(60), token_ids(60)
    ids_TK[ids_TK == 3] = 4  # expert 3 gets no token
    ids_TK = ids_TK[ids_TK[:, 0] != ids_TK[:, 1]]
    tokens_T = tokens_T[: len(ids_TK)]
    of_text = shannon(Counter(tokens_T.tolist()).values())
    said = tokens.concentration(ids_TK, tokens_T, E)
    for e in (0, 1, 2, 4):
        seen = Counter(tokens_T[(ids_TK == e).any(1)].tolist())
        assert said[e].item() == pytest.approx(1 - shannon(seen.values()) / of_text, abs=EXACT)
    assert said[3].isnan()


def test_top_tokens_are_an_experts_most_frequent():
    ids_TK, tokens_T = routing(60), token_ids(60)
    for e, found in enumerate(tokens.top_tokens(ids_TK, tokens_T, E, count=3)):
        seen = Counter(tokens_T[(ids_TK == e).any(1)].tolist())
        expected = sorted(seen.items(), key=lambda each: (-each[1], each[0]))[:3]
        total = sum(seen.values())
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert [share for _, share in found] == pytest.approx([n / total for _, n in expected])


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, E / K])
def test_an_expert_takes_the_first_tokens_up_to_its_capacity(factor):
    ids_SLK = routing(3, 21, skew=3)
    room = math.ceil(factor * 21 * K / E)
    expected = torch.zeros(3, 21, K, dtype=torch.bool)
    for s in range(3):
        taken = Counter()
        for position, k in itertools.product(range(21), range(K)):
            e = ids_SLK[s, position, k].item()
            expected[s, position, k] = taken[e] >= room
            taken[e] += 1
    said = drops.dropped(ids_SLK, E, factor)
    assert torch.equal(said, expected)
    assert said.any() == (factor < E / K)
    parts = drops.by_position(said, ids_SLK < E, 4)  # 6, 5, 5, 5 positions
    for part, (start, end) in zip(parts, [(0, 6), (6, 11), (11, 16), (16, 21)], strict=True):
        assert part.item() == pytest.approx(expected[:, start:end].double().mean().item())


def segments(ids_SLK: torch.Tensor, m: int) -> list[Counter]:
    return [
        Counter(sequence[start : start + m].flatten().tolist())
        for sequence in ids_SLK
        for start in range(len(sequence) - m + 1)
    ]


@pytest.mark.parametrize("m", [1, 4, 21])
def test_segment_routing_is_the_best_f1_of_all_thresholds(m):
    ids_SLK = routing(3, 21)
    counts_NE = consistency.segment_counts(ids_SLK, E, m)
    assert counts_NE.tolist() == [[each[e] for e in range(E)] for each in segments(ids_SLK, m)]
    best = 0.0
    for threshold in range(1, m + 1):
        right = taken = chosen = 0
        for each in segments(ids_SLK, m):
            chosen += sum(each.values())
            routed = [n for n in each.values() if n >= threshold]
            taken, right = taken + m * len(routed), right + sum(routed)
        if taken:
            precision, recall = right / taken, right / chosen
            best = max(best, 2 * precision * recall / (precision + recall))
    assert consistency.best_routing(counts_NE, m) == pytest.approx(best, abs=EXACT)
    assert m > 1 or best == 1.0


@pytest.mark.parametrize("m", [1, 4, 21])
def test_segment_cache_holds_what_a_segment_uses_most(m):
    ids_SLK = routing(3, 21)
    said = consistency.best_hit_rates(consistency.segment_counts(ids_SLK, E, m))
    for size in range(1, E + 1):
        hits = [sum(n for _, n in each.most_common(size)) for each in segments(ids_SLK, m)]
        assert said[size - 1].item() == pytest.approx(sum(hits) / len(hits) / (m * K), abs=EXACT)
    assert said[-1] == 1.0


@pytest.mark.parametrize("m", [0, 22])
def test_a_segment_lies_in_a_sequence(m):
    with pytest.raises(ValueError, match="segment"):
        consistency.segment_counts(routing(3, 21), E, m)


def test_cosines_are_of_all_weights_of_an_expert_as_one_vector():
    draw = torch.Generator().manual_seed(2)
    w1, w2 = (torch.randn(E, *shape, generator=draw) for shape in [(4, 3), (3, 4)])
    w1[4], w2[4] = w1[1], w2[1]
    w1[2], w2[2] = 0, 0
    said = similarity.cosines([w1, w2.bfloat16()])
    vectors = [[*w1[e].flatten().tolist(), *w2.bfloat16()[e].flatten().tolist()] for e in range(E)]
    for a, b in itertools.product((0, 1, 3, 4), repeat=2):
        dot = math.fsum(x * y for x, y in zip(vectors[a], vectors[b], strict=True))
        expected = dot / math.hypot(*vectors[a]) / math.hypot(*vectors[b])
        assert said[a, b].item() == pytest.approx(expected, abs=EXACT)
    assert said[1, 4].item() == pytest.approx(1.0, abs=EXACT)
    assert said[2].isnan().all()
    pairs = similarity.off_diagonal(said)
    assert len(pairs) == E * (E - 1) // 2
    assert pairs[0] == said[0, 1]


def test_drift_compares_sets():
    ids_TK, others_TK = routing(60), routing(60, seed=5)
    others_TK[:20] = ids_TK[:20].flip(1)  # another order is no drift
    pairs = [(set(a), set(b)) for a, b in zip(ids_TK.tolist(), others_TK.tolist(), strict=True)]
    said = drift.drift(ids_TK, others_TK, E)
    assert said.changed == pytest.approx(sum(a != b for a, b in pairs) / 60)
    assert said.jaccard == pytest.approx(sum(len(a & b) / len(a | b) for a, b in pairs) / 60)
    assert 0 < said.changed < 1
    assert drift.drift(ids_TK, ids_TK.flip(1), E) == drift.Drift(0.0, 1.0)


def test_the_formulas_need_no_host():
    modules = "tokens, drops, consistency, similarity, drift, text, report"
    program = f"from ezpz_moe.tools.analysis import {modules}; import sys\n"
    program += "print('torchtitan' in sys.modules)"
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said == "False\n"
