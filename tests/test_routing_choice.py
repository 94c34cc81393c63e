"""What a router chooses by: logits, sinkhorn's plan and even assignment.

Statistics are seeded and within Hoeffding's bound (Probability inequalities for sums of bounded
random variables, 1963), so that a right function fails for one seed in a billion.
Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_cases import U, compiled
from torch import Tensor

from ezpz_moe.config.routing_schema import Router
from ezpz_moe.routing.assignment import (
    HostRules,
    balanced_experts,
    chosen,
    perturbed,
    popular_experts,
    popularity,
    sinkhorn,
    turns,
)
from ezpz_moe.routing.gate import activated, jittered, losing_infinities


def within(draws: int, *, span: float = 1.0, tests: int = 1) -> float:
    """How far the mean of so many draws from an interval may be from the expected one."""
    return span * math.sqrt(math.log(2 * tests * 1e9) / (2 * draws))


# Logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_jitter_is_even_on_both_sides_of_one(dtype: torch.dtype, noise: float) -> None:
    torch.manual_seed(0)
    x = torch.linspace(1, 2, 50_000).to(dtype)
    factor = jittered(x, noise).double() / x.double()
    rounding = torch.finfo(dtype).eps  # of the product: half of it, and as much of the draw
    assert jittered(x, noise).dtype == dtype
    assert factor.max() <= (1 + noise) * (1 + rounding)
    assert factor.min() >= (1 - noise) * (1 - rounding)
    # Each draw is off by half an eps at most; whether that adds up is what the test asks.
    off = within(len(x), span=2 * noise) + rounding / 2
    assert abs(factor.mean() - 1) <= off
    spread = (factor - 1).abs().mean()
    assert abs(spread - noise / 2) <= within(len(x), span=noise) + rounding / 2


def test_each_element_has_a_draw_of_its_own_and_the_gradient_has_it_too() -> None:
    torch.manual_seed(0)
    x = torch.ones(20, 30, dtype=torch.float64, requires_grad=True)
    y = jittered(x, 0.5)
    assert y.unique().numel() == 600
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)
    assert torch.equal(jittered(x, 0.0), x)


def written_activation(logits: list[float], activation: str) -> list[float]:
    if activation == "identity":
        return logits
    if activation == "softplus":
        return [max(x, 0) + math.log1p(math.exp(-abs(x))) for x in logits]
    positive = [max(x, 0.0) for x in logits]
    rms = math.sqrt(sum(x * x for x in positive) / len(positive))
    return [x / rms if rms else 0.0 for x in positive]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("activation", ["identity", "softplus", "relu_rmsnorm"])
def test_an_activation_is_the_one_written_out(activation: str, dtype: torch.dtype) -> None:
    E = 6
    torch.manual_seed(0)
    logits_BLE = (8 * torch.randn(2, 5, E)).to(dtype)
    logits_BLE[0, 0] = -logits_BLE[0, 0].abs()  # none positive
    found_BLE = activated(logits_BLE, activation)
    assert found_BLE.dtype == dtype
    for logits_E, found_E in zip(logits_BLE.view(-1, E), found_BLE.view(-1, E), strict=True):
        expected = written_activation(logits_E.tolist(), activation)
        # (E + 8) roundings in float32 and one to the dtype. Softplus is linear above 20, where it
        # is off by exp(-20) = 2.1e-9. The norm adds float32's eps to the mean square, here above 1.
        for value, true in zip(found_E.tolist(), expected, strict=True):
            bound = ((E + 8) * U + torch.finfo(dtype).eps) * true + 2.1e-9
            assert abs(value - true) <= (bound if activation != "identity" else 0)


@pytest.mark.parametrize("activation", ["identity", "softplus", "relu_rmsnorm"])
def test_gradients_of_an_activation(activation: str) -> None:
    torch.manual_seed(0)
    logits_BLE = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: activated(x, activation), logits_BLE)
    none_positive = torch.full((1, 1, 4), -2.0, requires_grad=True)
    out = activated(none_positive, activation)
    assert out.unique().numel() == 1
    assert torch.autograd.grad(out.sum(), none_positive)[0].isfinite().all()


def test_infinite_logits_become_nan_and_no_other_changes() -> None:
    logits = torch.tensor([[1.5, -torch.inf, 0.0], [torch.inf, torch.nan, -1e30]])
    logits.requires_grad_()
    seen = losing_infinities(logits)
    assert torch.equal(seen.isnan(), ~logits.isfinite())
    assert torch.equal(seen[logits.isfinite()], logits[logits.isfinite()])
    seen.nan_to_num().sum().backward()
    assert torch.equal(logits.grad, logits.isfinite().float())


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="'relu' is not one of identity, softplus, relu_rmsnorm"):
        activated(torch.zeros(1, 1, 2), "relu")


# Sinkhorn -----------------------------------------------------------------------------------------


def all_of(scores_TE: Tensor) -> Tensor:
    return torch.ones(len(scores_TE), dtype=torch.bool)


def plan(scores_TE: Tensor, *, tolerance: float = 1e-4, iterations: int = 100_000) -> Tensor:
    return sinkhorn(scores_TE, all_of(scores_TE), tolerance, iterations)


def written_plan(scores: list[list[float]], iterations: int) -> list[list[float]]:
    """Rows, then columns, scaled to their sums so many times."""
    T, E = len(scores), len(scores[0])
    plan = [list(row) for row in scores]
    for _ in range(iterations):
        for row in plan:
            row[:] = [x / sum(row) / T for x in row]
        sums = [sum(row[e] for row in plan) for e in range(E)]
        for row in plan:
            row[:] = [x / s / E for x, s in zip(row, sums, strict=True)]
    return plan


def contraction(scores_TE: Tensor) -> float:
    """By how much one iteration brings two of them together in Hilbert's metric, at least.

    Birkhoff's coefficient of the scores, squared: once for the rows, once for the columns.
    """
    logs_TE = scores_TE.double().log()
    ratios_TTE = logs_TE.unsqueeze(1) - logs_TE.unsqueeze(0)
    diameter = (ratios_TTE.amax(-1) - ratios_TTE.amin(-1)).max().item()
    return math.tanh(diameter / 4) ** 2


def even_scores(T: int, E: int, seed: int = 0) -> Tensor:
    return 0.5 + torch.rand(T, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5])
@pytest.mark.parametrize("spread", [1, 30], ids=["even", "extreme"])
@pytest.mark.parametrize(("T", "E"), [(64, 8), (1, 4), (40, 1), (3, 16)])
def test_every_token_has_1_over_T_and_every_expert_1_over_E(
    T: int, E: int, spread: float, tolerance: float
) -> None:
    """Scores of 1 to 10^-spread. Columns come last, so that the rows are what tolerance is for."""
    torch.manual_seed(0)
    plan_TE = plan(10 ** (-spread * torch.rand(T, E)), tolerance=tolerance).double()
    rounding = (T + E + 10) * U
    assert (T * plan_TE.sum(1) - 1).abs().max() <= tolerance + rounding
    assert (E * plan_TE.sum(0) - 1).abs().max() <= rounding


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_plan_is_the_one_written_out_and_run_to_convergence(tolerance: float) -> None:
    """When an iteration moves ratios of factors by t, they are t / (1 - contraction) off the end.

    So says Hilbert's metric. As the columns' sums are right, that is also the most by which a
    weight is off, relatively.
    """
    scores_TE = even_scores(12, 5)
    expected_TE = torch.tensor(written_plan(scores_TE.tolist(), 500), dtype=torch.float64)
    error_TE = plan(scores_TE, tolerance=tolerance).double() / expected_TE - 1
    bound = math.expm1(tolerance / (1 - contraction(scores_TE))) + 100 * U
    assert error_TE.abs().max() <= bound


def test_the_limit_of_iterations_holds() -> None:
    scores_TE = 10 ** (-20 * even_scores(12, 5).double())
    for iterations in (1, 3):
        expected_TE = written_plan(scores_TE.tolist(), iterations)
        found_TE = plan(scores_TE, tolerance=1e-12, iterations=iterations)
        torch.testing.assert_close(
            found_TE, torch.tensor(expected_TE, dtype=torch.float64), rtol=1e-12, atol=0
        )


def test_a_factor_per_token_does_not_matter() -> None:
    """Powers of two, which no rounding sees: every bit is the same."""
    scores_TE = even_scores(20, 6)
    factor_T1 = 2.0 ** torch.randint(-30, 30, (20, 1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan(scores_TE * factor_T1), plan(scores_TE))


def test_the_order_of_tokens_and_experts_does_not_matter() -> None:
    scores_TE = even_scores(20, 6).double()
    torch.manual_seed(0)
    tokens, experts = torch.randperm(20), torch.randperm(6)
    permuted_TE = plan(scores_TE[tokens][:, experts], tolerance=1e-13)
    expected_TE = plan(scores_TE, tolerance=1e-13)[tokens][:, experts]
    torch.testing.assert_close(permuted_TE, expected_TE, rtol=1e-11, atol=0)


def test_padding_has_no_weight_and_changes_none() -> None:
    scores_TE = even_scores(10, 4)
    mask_T = torch.arange(10) % 3 != 0
    scores_TE[~mask_T] = torch.nan
    plan_TE = sinkhorn(scores_TE, mask_T, 1e-4, 100)
    assert not plan_TE[~mask_T].any()
    expected_TE = plan(scores_TE[mask_T])
    torch.testing.assert_close(plan_TE[mask_T], expected_TE, rtol=1e-5, atol=0)


def test_no_tokens_have_an_empty_plan_and_only_padding_one_of_zeros() -> None:
    assert plan(torch.zeros(0, 4)).shape == (0, 4)
    none_T = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(sinkhorn(even_scores(3, 4), none_T, 1e-4, 100), torch.zeros(3, 4))


def test_an_expert_that_nobody_can_choose_gets_nothing() -> None:
    """Softmax of logits far apart is exactly zero; no plan has even columns then."""
    scores_TE = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert torch.equal(plan(scores_TE), torch.tensor([[0.25, 0.0], [0.25, 0.0]]))
    # The others' plan is as without it, and as soon found: a coarse one shows by when it stopped.
    others_TE = 10 ** (3 * even_scores(20, 3))
    with_it_TE = torch.cat([others_TE, torch.zeros(20, 1)], dim=1)
    found_TE = plan(with_it_TE, tolerance=0.3)
    expected_TE = torch.cat([plan(others_TE, tolerance=0.3) * 3 / 4, torch.zeros(20, 1)], dim=1)
    torch.testing.assert_close(found_TE, expected_TE, rtol=1e-5, atol=0)
    assert not torch.allclose(plan(others_TE, tolerance=0.3), plan(others_TE), rtol=1e-2)


def test_where_no_even_plan_exists_the_best_one_is_approached() -> None:
    """Three of four tokens can go to expert 0 only: the fourth goes to expert 1, all of it."""
    scores_TE = torch.tensor([[1.0, 0.0]] * 3 + [[1.0, 1e-3]])
    plan_TE = plan(scores_TE, iterations=2000)
    expected_TE = torch.tensor([[1 / 6, 0.0]] * 3 + [[0.0, 0.5]])
    torch.testing.assert_close(plan_TE, expected_TE, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("gap", [0.0, 30.0])
def test_popularity_of_an_expert_does_not_decide_the_choice(gap: float) -> None:
    """Each expert's score is far above the next one's, yet the choice is that without the gap.

    A factor per expert is absorbed like one per token. What is left are random scores, in which
    no expert differs from another: a load has the mean T/E. Choices that took no notice of each
    other would be within Hoeffding's bound of it, and balancing only brings them nearer.
    """
    T, E = 2000, 5
    torch.manual_seed(0)
    random_TE = torch.randn(T, E, dtype=torch.float64)
    popularity_E = -gap * torch.arange(E, dtype=torch.float64)
    scores_TE = (random_TE + popularity_E).softmax(-1)
    load_E = plan(scores_TE, tolerance=1e-10).argmax(-1).bincount(minlength=E)
    fair_E = plan(random_TE.softmax(-1), tolerance=1e-10).argmax(-1).bincount(minlength=E)
    assert torch.equal(load_E, fair_E)
    assert (load_E / T - 1 / E).abs().max() <= within(T, tests=E)
    if gap:
        assert scores_TE.argmax(-1).bincount(minlength=E)[0] == T  # what plain top-1 does


def test_the_operator_is_as_torch_wants_it_and_compiles() -> None:
    arguments = (even_scores(6, 4).T, all_of(torch.zeros(4)), 1e-4, 100)
    torch.library.opcheck(sinkhorn, arguments)
    assert torch.equal(compiled(sinkhorn)(*arguments), sinkhorn(*arguments))


# Even assignment ----------------------------------------------------------------------------------


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 20), st.data())
def test_loads_differ_by_one_at_most_and_a_tokens_experts_are_distinct(
    T: int, experts: int, first: int, data: st.DataObject
) -> None:
    K = data.draw(st.integers(1, experts))
    E = first + experts
    ids_TK = balanced_experts(torch.arange(T), K, E, first=first)
    assert (ids_TK.shape, ids_TK.dtype) == ((T, K), torch.int64)
    load_E = ids_TK.flatten().bincount(minlength=E)
    assert len(load_E) == E
    assert not load_E[:first].any()
    assert load_E[first:].max() - load_E[first:].min() <= 1
    assert all(len(set(row)) == K for row in ids_TK.tolist())


@pytest.mark.parametrize("routing", ["sinkhorn", "balanced"])
@pytest.mark.parametrize("padding", ["every other token", "one in three", "all", "none"])
def test_no_expert_has_more_than_its_share_of_padding(routing: str, padding: str) -> None:
    """Nor of the tokens that count, where experts are taken in turn."""
    T, K, E = 96, 3, 8
    every = {"every other token": 2, "one in three": 3, "all": 1, "none": T + 1}[padding]
    mask_BL = torch.arange(1, T + 1).view(4, -1) % every != 0
    scores_BLE = even_scores(T, E).view(4, -1, E)
    scores_BLE[~mask_BL] = torch.nan
    scores_BLE.requires_grad_()
    host_BLK = torch.ones(4, T // 4, K), torch.zeros(4, T // 4, K, dtype=torch.int64)
    rules = HostRules(norm=True, scale=1.0, limited=None)
    settings = Router(routing=routing)
    _, ids_BLK = chosen(*host_BLK, scores_BLE, mask_BL, settings, rules, training=True)
    assert all(len(set(row)) == K for row in ids_BLK.flatten(0, 1).tolist())
    load_E = ids_BLK[~mask_BL].flatten().bincount(minlength=E)
    assert load_E.max() - load_E.min() <= 1
    if routing == "balanced":
        load_E = ids_BLK[mask_BL].flatten().bincount(minlength=E)
        assert load_E.max() - load_E.min() <= 1


def test_turns_number_tokens_and_padding_each_for_itself() -> None:
    mask_T = torch.tensor([True, False, False, True, True, False])
    assert turns(mask_T).tolist() == [0, 0, 1, 1, 2, 2]


def even_choice(T: int, K: int, E: int, first: int) -> tuple[Tensor, Tensor]:
    return balanced_experts(torch.arange(T), K, E, first=first), torch.full((T, K), 2.5 / K)


def test_without_noise_nothing_changes() -> None:
    ids_TK, weights_TK = even_choice(5000, 3, 8, 2)
    found_TK, found_weights_TK = perturbed(ids_TK, weights_TK, noise=0.0, E=8, first=2)
    assert torch.equal(found_TK, ids_TK)
    assert torch.equal(found_weights_TK, weights_TK)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_noise_replaces_that_share_of_tokens_and_keeps_the_weights_sums(noise: float) -> None:
    T, K, E, first = 200_000, 3, 10, 2
    torch.manual_seed(0)
    ids_TK, weights_TK = even_choice(T, K, E, first)
    found_TK, found_weights_TK = perturbed(ids_TK, weights_TK, noise=noise, E=E, first=first)
    changed = (found_TK != ids_TK).any(-1).double().mean().item()
    # A random token has the same by chance: no more often than all three of the rarest expert's.
    same_by_chance = popularity(K, E - first).max().item() ** K
    assert noise * (1 - same_by_chance) - within(T) <= changed <= noise + within(T)
    assert all(len(set(row)) == K for row in found_TK[:1000].tolist())
    assert found_TK.sort(-1).values.diff().min() > 0  # distinct
    assert found_TK.min() >= first
    assert found_TK.max() < E
    # Each weight moved that far to one that is a share u / (u + u' + u'') of the sum.
    assert (found_weights_TK.double().sum(-1) / 2.5 - 1).abs().max() <= 10 * U
    uneven_TK = weights_TK + (found_weights_TK - weights_TK) / noise
    assert uneven_TK.min() >= -1e-5
    assert abs(uneven_TK.mean(0) / 2.5 - 1 / K).max() <= within(T, tests=K) + 1e-5
    # Three even shares are u / (u + u' + u'') = 1/3 +- 0.16; none is where it was.
    assert (uneven_TK / 2.5).std(0).min() > 0.1


@pytest.mark.parametrize(("K", "E"), [(1, 1), (1, 8), (3, 8), (4, 8), (5, 8), (8, 8), (6, 64)])
def test_every_expert_is_chosen_as_often_as_its_popularity_says(K: int, E: int) -> None:
    T = 100_000
    torch.manual_seed(0)
    ids_TK = popular_experts(T, K, E)
    assert ids_TK.shape == (T, K)
    assert K == 1 or ids_TK.sort(-1).values.diff().min() > 0  # distinct
    share_E = popularity(K, E)
    assert share_E.min() > 0 or K > E / 2
    assert share_E.max() <= 1 + E * U
    assert share_E.double().sum() == pytest.approx(K, rel=E * U)
    found_E = ids_TK.flatten().bincount(minlength=E).double() / T
    assert (found_E - share_E).abs().max() <= within(T, tests=E)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("K", "E", "first"), [(2, 8, 0), (8, 64, 0), (6, 20, 4)])
def test_noise_makes_the_load_as_uneven_as_the_page_says(
    K: int, E: int, first: int, noise: float
) -> None:
    """A coefficient of variation of 0.58 times the noise, over the experts that are not skipped.

    Loads are off by ``within``, and so is their standard deviation at most, by the triangle
    inequality; the even part differs by one token.
    """
    T, experts = 50_000, E - first
    torch.manual_seed(0)
    ids_TK, _ = perturbed(*even_choice(T, K, E, first), noise=noise, E=E, first=first)
    load_E = ids_TK.flatten().bincount(minlength=E)[first:] / T
    cv = (load_E.double().std(correction=0) / (K / experts)).item()
    expected = noise * math.sqrt((1 - 1 / experts**2) / 3)
    off = (within(T, tests=experts) if noise else 0.0) + 1 / T
    assert abs(cv - expected) <= off / (K / experts)


def test_the_popular_experts_are_not_the_neighbours_of_each_other() -> None:
    """All pairs occur: an order of its own for each token, or steps would choose some never."""
    torch.manual_seed(0)
    T, E = 50_000, 8
    ids_TK = popular_experts(T, 2, E).sort(-1).values
    pairs = (ids_TK[:, 0] * E + ids_TK[:, 1]).unique()
    assert len(pairs) == E * (E - 1) // 2
