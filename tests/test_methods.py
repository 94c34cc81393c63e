"""``benchmarks/methods.py``: the bytes that leave a rank, which it computes from shapes."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ezpz_moe.compute.sending import goes_to
from ezpz_moe.hosts.model_summary import ModelSummary

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from methods import SEQ_LEN, SEQUENCES, exchanged_bytes

MODEL = ModelSummary(
    dim=64, n_layers=4, num_experts=4, top_k=2, expert_hidden_dim=32, total=0, active=0, embedding=0
)
WIDTH = 16


def rows_that_leave(experts: int, top_k: int) -> tuple[int, int]:
    """Of all choices that a token can make: those that go to the other of two ranks, and all."""
    ids_TK = torch.tensor(list(itertools.combinations(range(experts), top_k)))
    goes_PT = goes_to(ids_TK, experts // 2, 2)
    return int(goes_PT[1].sum()), len(ids_TK)


def test_what_is_exchanged_is_the_sum_by_hand() -> None:
    """Two of four experts: five of six pairs have one of the other rank's.

    Then a row of 16 bfloat16 goes there and back, in forward and in backward, 4 x 32 bytes, and two
    ids of 8 bytes and two scores of 4 there, whose gradients come back, 2 x 16 bytes.
    """
    tokens = SEQUENCES * SEQ_LEN
    assert exchanged_bytes(MODEL, WIDTH, 1) == pytest.approx(tokens * 5 / 6 * (4 * 32 + 2 * 16))


@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(8, 3), (6, 6), ((4, 8, 12), (1, 2, 3)), ((4, 8), 1)]
)
def test_what_is_exchanged_counts_the_rows_that_the_layers_send(num_experts, top_k) -> None:
    """In every layer its own experts, choices and scores, whichever sizes they have in common."""
    layers = len(num_experts) if isinstance(num_experts, tuple) else 3
    each = (num_experts,) * layers if isinstance(num_experts, int) else num_experts
    chosen = (top_k,) * layers if isinstance(top_k, int) else top_k
    wanted = 0.0
    for experts, k in zip(each, chosen, strict=True):
        leave, choices = rows_that_leave(experts, k)
        wanted += SEQUENCES * SEQ_LEN * leave / choices * (4 * WIDTH * 2 + k * (8 + 4 + 4))
    model = replace(MODEL, num_experts=num_experts, top_k=top_k)
    assert exchanged_bytes(model, WIDTH, layers) == pytest.approx(wanted)
