"""One record in place of several neighbours: fewer of them say the same about more steps.

Counts are added up exactly, and so no load over the steps of a run changes; alerts are kept as the
records raised them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import add
from typing import Any

from ezpz_moe.telemetry.alerts import Alerts
from ezpz_moe.telemetry.record import LayerRecord, StepRecord
from ezpz_moe.telemetry.watched import Merged

_ADDED = ("rows_dispatched", "rows_off_rank", "rows_off_node")


def fit(one: StepRecord, other: StepRecord) -> bool:
    """Return whether ``other`` goes on where ``one`` ends, in the same run with the same layers."""
    return other.step - other.steps == one.step and _kind(one) == _kind(other)


def merged(records: Sequence[StepRecord], alerts: Alerts) -> StepRecord:
    """Return what :func:`joined` does, with the alerts that the records raised one by one.

    Args:
        records: neighbours that fit, at least one.
        alerts: has watched all records before them, and then has watched these.
    """
    raised = [alert for record in records for alert in alerts.raised(record)]
    number = sum(record.merged.records if record.merged else 1 for record in records)
    return replace(joined(records), merged=Merged(number, tuple(raised), alerts.watched))


def joined(records: Sequence[StepRecord]) -> StepRecord:
    """Return one record of all the steps of neighbours that :func:`fit`, at least one.

    Sums are exact. Means over tokens are weighted by tokens, means over assignments by those
    (``padding_waste`` is one over computed rows: there the weight is an approximation), losses by
    steps. All else is that of the last record, the sample of pairs among it.
    """
    total = records[0]
    for record in records[1:]:
        total = replace(record, steps=total.steps + record.steps, layers=_layers(total, record))
    return total


def _kind(record: StepRecord) -> tuple[Any, ...]:
    """Return what neighbours have to have in common."""
    layers = tuple(
        (
            *(layer.layer, len(layer.counts_E), len(layer.zero_counts_Z)),
            *(layer.losses.keys(), layer.scaled_losses.keys()),
            *(getattr(layer, name) is None for name in _ADDED),
        )
        for layer in record.layers
    )
    run = (record.model, record.job, record.backend, record.computed_by)
    return layers, run, record.settings, record.thresholds, record.warmup_steps


def _layers(one: StepRecord, other: StepRecord) -> tuple[LayerRecord, ...]:
    return tuple(
        _layer(*layers, (one.steps, other.steps))
        for layers in zip(one.layers, other.layers, strict=True)
    )


def _layer(one: LayerRecord, other: LayerRecord, steps: tuple[int, int]) -> LayerRecord:
    tokens = one.tokens, other.tokens
    assigned = sum(one.counts_E), sum(other.counts_E)
    added: dict[str, Any] = {
        name: None if rows is None else getattr(one, name) + rows
        for name in _ADDED
        for rows in (getattr(other, name),)
    }
    sampled = one if other.sampled_tokens is None else other
    return replace(
        other,
        tokens=sum(tokens),
        counts_E=tuple(map(add, one.counts_E, other.counts_E)),
        zero_counts_Z=tuple(map(add, one.zero_counts_Z, other.zero_counts_Z)),
        top1_probability=_mean(one.top1_probability, other.top1_probability, tokens),
        margin=_mean(one.margin, other.margin, tokens),
        losses=_means(one.losses, other.losses, steps),
        scaled_losses=_means(one.scaled_losses, other.scaled_losses, steps),
        padding_waste=_mean_if_any(one.padding_waste, other.padding_waste, assigned),
        drop_rate=_mean_if_any(one.drop_rate, other.drop_rate, assigned),
        rank_max_over_mean=_mean_if_any(one.rank_max_over_mean, other.rank_max_over_mean, assigned),
        probabilities_E=_probabilities(one, other, tokens),
        pairs=sampled.pairs,
        sampled_tokens=sampled.sampled_tokens,
        **added,
    )


def _probabilities(
    one: LayerRecord, other: LayerRecord, tokens: tuple[int, int]
) -> tuple[float, ...]:
    # Records of before there were these have none.
    if len(one.probabilities_E) != len(other.probabilities_E):
        return other.probabilities_E
    # Four digits, as in the records that they are from.
    return tuple(
        float(f"{_mean(p, q, tokens):.4g}")
        for p, q in zip(one.probabilities_E, other.probabilities_E, strict=True)
    )


def _means(
    one: dict[str, float], other: dict[str, float], weights: tuple[int, int]
) -> dict[str, float]:
    return {name: _mean(one[name], value, weights) for name, value in other.items()}


def _mean_if_any(one: float | None, other: float | None, weights: tuple[int, int]) -> float | None:
    if one is None or other is None:
        return one if other is None else other
    return _mean(one, other, weights)


def _mean(one: float, other: float, weights: tuple[int, int]) -> float:
    """Return the weighted mean, or the later of two without a weight."""
    first, second = weights
    # A part without tokens has means of nothing, which may be NaN.
    if not first or not second:
        return one if first else other
    return one * (first / (first + second)) + other * (second / (first + second))
