"""Biases against the formulas written out, schedules, and counters that count each token once.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from routing_cases import RUNS, U, over_runs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ezpz_moe.config.schedule_schema import Schedule
from ezpz_moe.routing.balance import bias_change, value_at
from ezpz_moe.routing.counters import SUMS, count, is_recomputation

# Bias ---------------------------------------------------------------------------------------------

# Sums below 2**24 are exact in float32, so that no expert is on the wrong side of the mean.
loads = st.lists(st.integers(0, 2**14), min_size=1, max_size=256)


def written_change(counts: list[int], rate: float, *, by_sign: bool) -> list[float]:
    """By sign it is what the host does: rate * sign(mean - count), less the mean of all those."""
    mean = sum(counts) / len(counts)
    steps = []
    for each in counts:
        if by_sign:
            steps.append(rate * ((mean > each) - (mean < each)))
        else:
            steps.append(rate * (mean - each) / mean if mean else 0.0)
    return [step - sum(steps) / len(steps) for step in steps]


@given(loads)
@example([0, 0, 0])
@example([1, 0, 0, 0])
@example([7])
@pytest.mark.parametrize("by_sign", [True, False], ids=["sign", "proportional"])
def test_a_bias_moves_as_written_out_and_all_together_by_nothing(
    by_sign: bool, counts: list[int]
) -> None:
    """Bound: a mean of E steps no larger than the largest is off by (E + 2) u of that one."""
    rate, E = 0.01, len(counts)
    change_E = bias_change(torch.tensor(counts), rate=rate, by_sign=by_sign)
    expected_E = written_change(counts, rate, by_sign=by_sign)
    largest = rate * max(1.0, E * max(counts) / max(1, sum(counts)))
    bound = (E + 10) * U * largest
    assert change_E.dtype == torch.float32
    assert change_E.tolist() == pytest.approx(expected_E, rel=0, abs=bound)
    assert abs(change_E.double().sum().item()) <= E * bound


@pytest.mark.parametrize("by_sign", [True, False], ids=["sign", "proportional"])
def test_an_even_load_leaves_every_bias_where_it_is(by_sign: bool) -> None:
    for each in (0, 1, 3, 2**30 + 1):
        change_E = bias_change(torch.full((7,), each), rate=0.1, by_sign=by_sign)
        assert torch.equal(change_E, torch.zeros(7))


@pytest.mark.parametrize("scale", [1, 1000])
def test_proportional_is_relative_to_the_mean_load_and_sign_is_not(scale: int) -> None:
    """Also when there are fewer assignments than experts."""
    counts_E = scale * torch.tensor([2, 0, 0, 0, 0, 0, 0, 0])
    proportional_E = bias_change(counts_E, rate=0.5, by_sign=False)
    assert proportional_E.tolist() == [-3.5, *[0.5] * 7]
    assert bias_change(counts_E, rate=0.5, by_sign=True).tolist() == [-0.875, *[0.125] * 7]


# Schedules ----------------------------------------------------------------------------------------

SHAPES = ("linear", "exponential", "cosine")
over_shapes = pytest.mark.parametrize("shape", SHAPES)

values = st.floats(1e-300, 1e300)
steps = st.integers(2, 2**40)


@over_shapes
@given(values, values, steps)
@example(1e-300, 1e300, 3)
@example(0.5, 1e16, 2)
def test_a_schedule_begins_and_ends_where_it_says(
    shape: str, start: float, end: float, steps: int
) -> None:
    schedule = Schedule(start=start, end=end, steps=steps, shape=shape)
    assert [value_at(schedule, step) for step in (0, 1)] == [start] * 2
    assert [value_at(schedule, step) for step in (steps, steps + 1, 2**50)] == [end] * 3


@over_shapes
@given(values, values, steps, st.data())
def test_a_schedule_moves_in_one_direction(
    shape: str, start: float, end: float, steps: int, data: st.DataObject
) -> None:
    """Within rounding: some operations in float64, of numbers no larger than the larger end."""
    schedule = Schedule(start=start, end=end, steps=steps, shape=shape)
    step = data.draw(st.integers(1, steps - 1))
    before, after = value_at(schedule, step), value_at(schedule, step + 1)
    size = max(before, after) if shape == "exponential" else max(start, end)
    # A power's exponent p is off by its rounding; its base may have a logarithm of 691.
    rounding = 1e-12 * size
    assert (after - before) * math.copysign(1, end - start) >= -rounding
    assert min(start, end) - rounding <= before <= max(start, end) + rounding


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [4, 3.25, 2.5, 1.75, 1]),
        ("exponential", [4, 2 * math.sqrt(2), 2, math.sqrt(2), 1]),
        ("cosine", [4, 2.5 + 1.5 * math.sqrt(0.5), 2.5, 2.5 - 1.5 * math.sqrt(0.5), 1]),
    ],
)
def test_what_a_schedule_has_in_between(shape: str, expected: list[float]) -> None:
    schedule = Schedule(start=4.0, end=1.0, steps=5, shape=shape)
    assert [value_at(schedule, step) for step in range(1, 6)] == pytest.approx(expected, rel=1e-15)
    at_once = Schedule(start=4.0, end=1.0, steps=1, shape=shape)
    assert value_at(at_once, 1) == 1


@over_shapes
@given(values, st.integers(1, 100), st.integers(0, 200))
def test_a_constant_is_itself_in_every_step(
    shape: str, value: float, steps: int, step: int
) -> None:
    schedule = Schedule(start=value, end=value, steps=steps, shape=shape)
    assert schedule.is_constant
    assert value_at(schedule, step) == value
    assert value_at(Schedule.model_validate(value), step) == value


# Counters -----------------------------------------------------------------------------------------

E, S = 3, len(SUMS)


def counting(x_TD: Tensor, counts_E: Tensor, sums_S: Tensor) -> Tensor:
    """A layer that counts on the way, as a router does."""
    with torch.no_grad():
        chosen_TE = torch.nn.functional.one_hot(x_TD.argmax(-1), E).float()
        count(counts_E, sums_S, chosen_TE.sum(0), x_TD.sum().expand(S))
    return x_TD.square().sin()


def zeros() -> tuple[Tensor, Tensor]:
    return torch.zeros(E, dtype=torch.int64), torch.zeros(S)


X_TD = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [4.0, 1.0, 0.0], [9.0, 0.0, 0.0]])
COUNTS, SUM = [3, 1, 0], 26.0


@over_runs
def test_each_forward_counts_once_recomputed_or_not(run: Callable) -> None:
    """Gradient accumulation adds up; so does a forward pass in evaluation."""
    torch._dynamo.reset()
    counts_E, sums_S = zeros()
    function = run(partial(counting, counts_E=counts_E, sums_S=sums_S))
    x_TD = X_TD.clone().requires_grad_()
    for forwards in (1, 2):
        loss = function(x_TD).sum()
        expected = [forwards * each for each in COUNTS], [forwards * SUM] * S
        assert (counts_E.tolist(), sums_S.tolist()) == expected
        loss.backward()
        assert (counts_E.tolist(), sums_S.tolist()) == expected
    torch.testing.assert_close(x_TD.grad, 2 * 2 * X_TD * X_TD.square().cos())
    with torch.no_grad():
        function(x_TD)
    assert counts_E.tolist() == [3 * each for each in COUNTS]


def test_checkpoints_within_checkpoints_and_a_second_backward_count_once() -> None:
    counts_E, sums_S = zeros()
    inner = RUNS["not_reentrant"](partial(counting, counts_E=counts_E, sums_S=sums_S))
    x_TD = X_TD.clone().requires_grad_()
    loss = checkpoint(lambda x: inner(x) * 2, x_TD, use_reentrant=False).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert counts_E.tolist() == COUNTS


def test_a_recomputation_is_a_forward_within_a_backward() -> None:
    seen = []

    def noting(x: Tensor) -> Tensor:
        seen.append(is_recomputation())
        return x.exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(noting, x, use_reentrant=False).sum().backward()
    noting(x)
    assert seen == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_the_counters_keep_their_dtypes_and_the_operator_is_as_torch_wants_it(
    dtype: torch.dtype,
) -> None:
    counts_E, sums_S = zeros()
    counts_E += 2**40  # more than float32 counts
    new_E, new_S = torch.tensor([1, 0, 2]).to(dtype), torch.ones(S, dtype=dtype)
    count(counts_E, sums_S, new_E, new_S)
    assert (counts_E - 2**40).tolist() == [1, 0, 2]
    assert (counts_E.dtype, sums_S.dtype) == (torch.int64, torch.float32)
    torch.library.opcheck(count, (*zeros(), new_E, new_S))
