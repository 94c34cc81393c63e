"""Flavors that are like a published model: its size, less what their own comments say is absent.

``published`` is the sum of the model's parts, by hand, from its config.json or paper. It is
compared with what its authors print; those of Qwen3-Next, Mixtral and OLMoE are also the counts of
transformers' own classes. Our flavor has to differ from it by the parts that torchtitan lacks, to
the last parameter.

Legend: V = vocabulary, D = model dimension, L = layers, E = experts, F = an expert's hidden
dimension, H = size of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.counts import counts_at_hand


class Like(NamedTuple):
    """Parameters of a published model, and how many of them our flavor lacks, or has more if < 0.

    ``printed`` has billions, total and active; empty for what is not printed.
    """

    published: int
    without_idle_experts: int
    absent: int
    printed: tuple[str, str]
    embedding: int = 0  # and the output matrix: left out of the active ones that are printed


def mla(dim: int, heads: int) -> int:
    """Our latent attention: queries; latents and rotary keys; norm; keys and values; output."""
    return (
        dim * heads * (128 + 64)
        + dim * (512 + 64)
        + 512
        + 512 * heads * (128 + 128)
        + heads * 128 * dim
    )


def olmoe() -> Like:
    V, D, L, E, F, H = 50304, 2048, 16, 64, 1024, 128
    attention = 4 * D * D + 2 * D  # a norm for all heads of queries, one for all of keys
    layer = attention + 2 * D + E * D + E * 3 * D * F
    total = 2 * V * D + L * layer + D
    absent = L * (2 * D * 8 * H + 2 * (D - H))  # 8 heads of keys and values; norms of one head
    return Like(total, total - L * (E - 8) * 3 * D * F, absent, ("6.9", "1.3"))


def mixtral() -> Like:
    V, D, L, E, F, H = 32000, 4096, 32, 8, 14336, 128
    attention = 2 * D * D + 2 * D * 8 * H
    layer = attention + 2 * D + E * D + E * 3 * D * F
    total = 2 * V * D + L * layer + D
    absent = L * (2 * D * 4 * H - 2 * H)  # 4 heads of keys and values; norms are ours
    return Like(total, total - L * (E - 2) * 3 * D * F, absent, ("46.7", "12.9"))


def qwen3_next() -> Like:
    V, D, L, E, F, H = 151936, 2048, 48, 512, 512, 128
    # Queries, keys, values and gates of 16 and 32 heads; beta and decay; convolution; decay's two
    # parameters, norm; output.
    of_values = 32 * H
    linear = D * (2 * 16 * H + 2 * of_values) + D * 64 + (2 * 16 * H + of_values) * 4
    linear += 2 * 32 + H + of_values * D
    # Queries and gates of 16 heads, keys and values of 2, all of 256; output; their norms.
    full = D * 2 * 16 * 256 + D * 2 * 2 * 256 + 16 * 256 * D + 2 * 256
    attention = L // 4 * (3 * linear + full)
    experts = (E + 1) * 3 * D * F + E * D + D  # with the shared one, the router and its gate
    total = 2 * V * D + attention + L * (experts + 2 * D) + D
    absent = attention - L * mla(D, heads=16)
    return Like(total, total - L * (E - 10) * 3 * D * F, absent, ("80", "3"), embedding=2 * V * D)


def pr_moe() -> Like:
    V, D, L, F, positions = 50304, 1024, 24, 4096, 2048
    experts = 10 * 32 + 2 * 64
    ffn = 2 * D * F + F + D
    attention = 4 * D * D + 4 * D
    norms = 4 * D * L + 2 * D  # layer norms have biases
    total = V * D + positions * D + L * (attention + ffn) + norms + experts * (ffn + D)
    ours = 2 * V * D + L * (mla(D, heads=16) + 2 * D * F) + 2 * D * L + D + experts * (ffn + D)
    return Like(total, total - (experts - 12) * ffn, total - ours, ("4", ""))


LIKE = {
    "olmoe_7B_like": olmoe(),
    "mixtral_8x7B_like": mixtral(),
    "qwen3_next_80B_like": qwen3_next(),
    "pr_moe_4B_like": pr_moe(),
}


@pytest.mark.parametrize("name", LIKE)
def test_a_sum_by_hand_is_what_its_authors_print(name: str) -> None:
    like = LIKE[name]
    active = like.without_idle_experts - like.embedding
    for number, printed in zip((like.published, active), like.printed, strict=True):
        digits = len(printed.partition(".")[2])
        assert not printed or f"{number / 1e9:.{digits}f}" == printed


@pytest.mark.parametrize("name", LIKE)
def test_a_flavor_has_what_it_says_of_it(name: str) -> None:
    like, model = LIKE[name], counts_at_hand(load_flavor(name))
    if model is None:
        pytest.skip("no counts are shipped for this host: test_models.py builds the flavor")
    assert model.total == like.published - like.absent
    assert model.active == like.without_idle_experts - like.absent


def test_a_latent_narrows_the_experts_of_16B() -> None:
    D, Z, E, F, layers = 2048, 512, 64, 1408, 26
    whole, latent = (counts_at_hand(load_flavor(name)) for name in ("16B", "16B_latent"))
    assert whole is not None
    assert latent is not None
    assert whole.total - latent.total == layers * (E * 3 * F * (D - Z) - 2 * Z * D)
