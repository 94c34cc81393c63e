"""The figures of expert load against the formulas written out in plain float64 Python."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from telemetry_cases import layer, record

from ezpz_moe.telemetry import figures
from ezpz_moe.telemetry.scalars import scalars

# A sum of n = 300 positive float64 has a relative error of at most n * 2**-53 = 3.3e-14; a figure
# is made of at most three such sums and a few roundings.
EXACT = {"rel": 1e-12, "abs": 1e-12}

counts = st.lists(st.integers(0, 2**40), min_size=1, max_size=300)


def reference(counts_E: list[int]) -> dict[str, float]:
    """Every formula of docs/guides/telemetry.md, written out."""
    experts, total = len(counts_E), sum(counts_E)
    mean = total / experts
    ordered = sorted(counts_E)

    def percentile(percent: float) -> float:
        place = percent / 100 * (experts - 1)
        below = math.floor(place)
        above = min(below + 1, experts - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    shares = [count / total for count in counts_E if count]
    entropy = -sum(share * math.log(share) for share in shares)
    return {
        "cv": math.sqrt(sum((count - mean) ** 2 for count in counts_E) / experts) / mean,
        "max_over_mean": max(counts_E) / mean,
        "max_violation": (max(counts_E) - mean) / mean,
        "min_over_mean": min(counts_E) / mean,
        "p50_over_mean": percentile(50) / mean,
        "p95_over_mean": percentile(95) / mean,
        "entropy": entropy,
        "effective_fraction": math.exp(entropy) / experts,
        "dead_experts": sum(not count for count in counts_E),
    }


@given(counts.filter(any))
@example([7])
@example([5] * 8)
@example([0, 0, 9, 0])
@example([1] + [0] * 255)
@example([2**40, 1])
def test_every_figure_is_its_formula(counts_E: list[int]) -> None:
    assert figures.load_figures(counts_E) == pytest.approx(reference(counts_E), **EXACT)
    frequency = [count / sum(counts_E) for count in counts_E]
    assert figures.selection_frequency(counts_E) == pytest.approx(frequency, **EXACT)


@pytest.mark.parametrize("experts", [1, 2, 8, 256])
def test_even_and_one_hot_load_are_the_ends_of_every_scale(experts: int) -> None:
    even, hot = figures.load_figures([3] * experts), figures.load_figures([3] + [0] * (experts - 1))
    assert even == pytest.approx(
        {
            "cv": 0,
            "max_over_mean": 1,
            "max_violation": 0,
            "min_over_mean": 1,
            "p50_over_mean": 1,
            "p95_over_mean": 1,
            "entropy": math.log(experts),
            "effective_fraction": 1,
            "dead_experts": 0,
        },
        **EXACT,
    )
    ends = {name: hot[name] for name in ("cv", "max_over_mean", "entropy", "effective_fraction")}
    expected = {
        "cv": math.sqrt(experts - 1),
        "max_over_mean": experts,
        "entropy": 0,
        "effective_fraction": 1 / experts,
    }
    assert ends == pytest.approx(expected, **EXACT)
    assert math.copysign(1, hot["entropy"]) == 1  # -0.0 reads as a mistake


@given(st.integers(1, 300))
@pytest.mark.filterwarnings("error")  # numpy's, of 0 / 0
def test_without_assignments_all_experts_are_dead_and_nothing_else_is_claimed(experts: int) -> None:
    counts_E = [0] * experts
    assert figures.load_figures(counts_E) == {"dead_experts": experts}
    assert math.isnan(figures.coefficient_of_variation(counts_E))
    assert math.isnan(figures.entropy(counts_E))
    assert figures.dead_experts(counts_E) == tuple(range(experts))


def test_what_was_dropped_is_not_computed_and_the_rest_of_the_rows_is_padding() -> None:
    """Of 10 tokens 2 are dropped; 12 rows are computed, 4 of them nobody's."""
    use = figures.use_of_rows(given=10, computed=12, dropped=2, counted=10)
    assert use == pytest.approx({"padding_waste": 4 / 12, "drop_rate": 2 / 10}, **EXACT)


def test_padding_that_is_dispatched_is_waste() -> None:
    """Of 10 tokens 4 are padding: 6 of the 12 rows are of use."""
    use = figures.use_of_rows(given=10, computed=12, dropped=0, counted=6)
    assert use == pytest.approx({"padding_waste": 6 / 12, "drop_rate": 0}, **EXACT)


def test_over_layers_is_the_mean_and_the_worst_at_the_bad_end() -> None:
    even, uneven = [10, 10], [20, 0]
    values = scalars(record(layer(even, 1), layer(uneven, 2), steps=2))
    assert {name: values[f"moe/{name}"] for name in ("cv", "min_over_mean", "dead_experts")} == {
        "cv": 0.5,
        "min_over_mean": 0.5,
        "dead_experts": 1,  # a sum: half an expert is not dead
    }
    worst = {
        "cv": 1,
        "max_over_mean": 2,
        "max_violation": 1,
        "min_over_mean": 0,
        "effective_fraction": 0.5,
        "entropy": 0,
        "dead_experts": 1,
    }
    assert {name: values[f"moe/{name}_worst"] for name in worst} == pytest.approx(worst, **EXACT)
    assert values["moe/tokens_per_expert"] == 5  # of one step, with two in the record
    assert "moe/margin_worst" not in values


def test_a_loss_that_is_not_finite_stays_visible() -> None:
    nan = layer([1, 1], 2, losses={"z_loss": math.nan})
    values = scalars(record(layer([1, 1], 1, losses={"z_loss": 1.0}), nan))
    assert math.isnan(values["moe/z_loss"])
    assert math.isnan(values["moe/z_loss_worst"])


def test_detail_adds_layers_and_then_experts() -> None:
    third = layer([3, 1], 3, bias_norm=0.5, probabilities_E=(0.6, 0.4))
    one = record(third, layer([1, 1], 4))
    brief, per_layer, per_expert = (
        scalars(one, detail) for detail in ("brief", "per_layer", "per_expert")
    )
    assert not any("layer_" in name for name in brief)
    assert brief.items() < per_layer.items() < per_expert.items()
    assert per_layer["moe/layer_3/cv"] == 0.5
    assert per_layer["moe/layer_3/bias_norm"] == 0.5
    assert "moe/layer_4/bias_norm" not in per_layer
    assert {name: per_expert[name] for name in per_expert.keys() - per_layer.keys()} == {
        "moe/layer_3/expert_0/frequency": 0.75,
        "moe/layer_3/expert_1/frequency": 0.25,
        "moe/layer_3/expert_0/probability": 0.6,
        "moe/layer_3/expert_1/probability": 0.4,
        "moe/layer_4/expert_0/frequency": 0.5,
        "moe/layer_4/expert_1/frequency": 0.5,
    }


def test_the_load_of_ranks_is_a_figure_where_there_is_one() -> None:
    layers = [layer([3, 1], 1, rank_max_over_mean=1.5), layer([1, 1], 2, rank_max_over_mean=1.25)]
    values = scalars(record(*layers, layer([1, 1], 3)))
    assert values["moe/rank_max_over_mean"] == 1.375
    assert values["moe/rank_max_over_mean_worst"] == 1.5
    assert "moe/rank_max_over_mean" not in scalars(record(layer([1, 1])))


def test_losses_scaled_and_unscaled_and_zero_computation_experts_have_names_of_their_own() -> None:
    adaptive = layer(
        [30, 30],
        zero_counts_Z=(20,),
        losses={"aux_loss": 1.5},
        scaled_losses={"aux_loss": 0.015},
        drop_rate=0.1,
        padding_waste=0.2,
    )
    values = scalars(record(adaptive))
    assert values["moe/aux_loss"] == 1.5
    assert values["moe/aux_loss_scaled"] == 0.015
    assert values["moe/zero_fraction"] == 0.25
    assert (values["moe/drop_rate"], values["moe/padding_waste"]) == (0.1, 0.2)
    assert values["moe/cv"] == 0  # of the routed experts alone


def test_a_layer_without_tokens_does_not_count() -> None:
    seen, unseen = layer([3, 1], 1), layer([0, 0], 2, bias_norm=0.5)
    with_it, without = (
        scalars(record(*layers), "per_expert") for layers in ([seen, unseen], [seen])
    )
    only = {"moe/layer_2/bias_norm", "moe/bias_norm", "moe/bias_norm_worst"}
    assert with_it.keys() - without.keys() == only
    assert {name: with_it[name] for name in without} == without
