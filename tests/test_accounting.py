"""The arithmetic of costs, against the same written out another way."""

import pytest
import torch

from ezpz_moe.config.routing_schema import raised_top_k
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import Anatomy, Cost, computing_experts, dense_model, mean_keys


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("window", [None, 1, 3, 64, 100])
def test_mean_keys_are_those_of_the_mask(seq_len: int, window: int | None) -> None:
    query, key = torch.meshgrid(torch.arange(seq_len), torch.arange(seq_len), indexing="ij")
    is_seen = key <= query
    if window is not None:
        is_seen &= query - key < window
    assert mean_keys(seq_len, window) * seq_len == is_seen.sum().item()


@pytest.mark.parametrize(
    ("num_experts", "top_k", "zero_experts", "raised"),
    [(8, 3, 0, 3), (8, 3, 8, 6), (8, 3, 1, 3), (8, 3, 2, 4), (64, 6, 16, 8), (8, 1, 3, 1)],
)
def test_top_k_is_raised_so_that_as_many_experts_compute(
    num_experts: int, top_k: int, zero_experts: int, raised: int
) -> None:
    assert raised_top_k(num_experts, top_k, zero_experts) == raised
    # Half a choice is what rounding can be off by.
    computing = computing_experts(raised, num_experts, zero_experts)
    assert abs(computing - top_k) <= 0.5 * num_experts / (num_experts + zero_experts) + 1e-12


def test_even_use_gives_the_computing_experts() -> None:
    """Each token takes k of E + Z in turn, so that all are used alike."""
    E, Z, k, tokens = 8, 4, 5, 12
    taken = torch.arange(tokens * k).reshape(tokens, k) % (E + Z)
    assert (taken < E).sum(dim=1).double().mean().item() == computing_experts(k, E, Z)


def test_a_model_without_experts_has_no_dense_one_beside_it() -> None:
    anatomy = Anatomy({"norms": Cost(3, 3)}, 4, 1, 0, 0, 0, 0, 0.0)
    with pytest.raises(EzpzError, match="no layer with experts"):
        dense_model(anatomy)
