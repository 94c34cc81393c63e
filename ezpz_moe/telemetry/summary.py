"""The figures of one record, as rows for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC
from itertools import groupby

from ezpz_moe.config.layer_sizes import in_words
from ezpz_moe.config.routing_schema import REPORTED_LOSSES
from ezpz_moe.telemetry.figures import WORST, layer_figures, over_layers
from ezpz_moe.telemetry.record import StepRecord

LABELS = {
    "cv": "CV (std / mean)",
    "max_over_mean": "max / mean",
    "rank_max_over_mean": "max / mean of ranks",
    "off_rank": "rows that leave their rank",
    "off_node": "rows that leave their node",
    "min_over_mean": "min / mean",
    "p50_over_mean": "p50 / mean",
    "p95_over_mean": "p95 / mean",
    "effective_fraction": "exp(entropy) / E",
    "dead_experts": "dead experts (sum)",
    "tokens_per_expert": "tokens per expert and step",
    "zero_fraction": "to zero-computation experts",
    "top1_probability": "top-1 probability",
    "margin": "top-1 less top-2",
    "bias_norm": "bias norm",
    "padding_waste": "padding waste",
    "drop_rate": "drop rate",
    **{loss: f"{loss}, unscaled" for loss in REPORTED_LOSSES},
}
NOTHING = "None: no layer was given a token."  # in place of a table without rows
_LONGEST = 1e12  # from here on digits are no longer read
_PAIRS = 5  # of a layer, in a table
_COLUMNS = {"dead_experts": "dead experts"}  # a table of layers does not sum


def over_layers_rows(record: StepRecord) -> list[dict[str, str]]:
    """Return a row per figure: over all layers, its worst value, and the layer that has it."""
    figures_L = [layer_figures(layer, record.steps) for layer in record.layers]
    summary = over_layers(figures_L)
    return [
        {
            "figure": label,
            "over layers": shown(summary[name]),
            **_worst(record, figures_L, name),
        }
        for name, label in LABELS.items()
        if name in summary
    ]


def layer_rows(record: StepRecord) -> list[dict[str, str]]:
    """Return a row per layer, with every figure that some layer has."""
    figures_L = [layer_figures(layer, record.steps) for layer in record.layers]
    has = [name for name in LABELS if any(name in figures for figures in figures_L)]
    return [
        {
            "layer": str(layer.layer),
            **{_COLUMNS.get(name, LABELS[name]): shown(figures.get(name)) for name in has},
        }
        for layer, figures in zip(record.layers, figures_L, strict=True)
    ]


def pair_rows(record: StepRecord) -> list[dict[str, str]]:
    """Return a row per layer with the experts that its tokens choose together most often.

    Empty if the record has no pairs.
    """
    return [
        {
            "layer": str(layer.layer),
            "tokens looked at": shown(layer.sampled_tokens),
            "experts of the same token": ", ".join(
                f"{a} and {b}: {times / layer.sampled_tokens:.1%}"
                for a, b, times in layer.pairs[:_PAIRS]
            ),
        }
        for layer in record.layers
        if layer.sampled_tokens
    ]


def headline(record: StepRecord) -> str:
    """Return what the record covers, in one line."""
    experts = sorted({len(layer.counts_E) for layer in record.layers})
    # Where every layer has its own number, the ends say more than all of them.
    numbers = " or ".join(map(str, experts)) if len(experts) < 3 else in_words(tuple(experts))
    loss = "" if record.loss is None else f", loss {shown(record.loss)}"
    layers = len(record.layers)
    return (
        f"{steps(record)}: {layers} MoE layer{'s' * (layers > 1)} of {numbers} experts, computed "
        f"by {_backend(record)}{loss}"
    )


def _backend(record: StepRecord) -> str:
    chosen = ", ".join(record.computed_by)
    return f"{chosen}, chosen by {record.backend}" if chosen else record.backend


def steps(record: StepRecord) -> str:
    """Return ``step 7``, or ``steps 1 to 10`` for a record that covers several."""
    if record.steps == 1:
        return f"step {record.step}"
    return f"steps {first_step(record)} to {record.step}"


def over_the_run(records: Sequence[StepRecord], fact: Callable[[StepRecord], str]) -> str:
    """Return what ``fact`` is, and from which step on, where a resumed run changed it."""
    stretches = [
        (name, first_step(next(stretch))) for name, stretch in groupby(records, fact) if name
    ]
    (first, _), *later = stretches or [("", 0)]
    return "; ".join([first, *(f"from step {begin} on {name}" for name, begin in later)])


def first_step(record: StepRecord) -> int:
    """Return the first of the steps that a record covers."""
    return record.step - record.steps + 1


def routing(record: StepRecord) -> str:
    """Return the settings of ``[router]`` and ``[balance]`` that are not the defaults."""
    changed = [f"{key} = {json.dumps(value)}" for key, value in record.settings.items()]
    return ", ".join(changed) or "the defaults"


def dates(records: Sequence[StepRecord]) -> str:
    """Return when the first and the last record were written; empty if they do not say."""
    times = [record.time.astimezone(UTC) for record in records if record.time]
    if not times:
        return ""
    first, last = times[0], times[-1]
    ends = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {ends} UTC"


def shown(value: float | None) -> str:
    """Format with three digits, or as a dash if there is no value."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1000 <= abs(value) < _LONGEST else f"{value:.3g}"


def _worst(record: StepRecord, figures_L: list[dict[str, float]], name: str) -> dict[str, str]:
    """Return the worst value and its layer, the first of several; empty if all layers are equal."""
    values = {
        layer.layer: figures[name]
        for layer, figures in zip(record.layers, figures_L, strict=True)
        if name in figures
    }
    # If all layers agree, none of them is the worst.
    if name not in WORST or len(set(values.values())) == 1:
        return {"worst": "-", "in layer": "-"}
    worst = float(WORST[name](list(values.values())))
    # NaN is always the worst, and equals nothing, itself included.
    in_layer = next((n for n, v in values.items() if v == worst or math.isnan(v)), None)
    return {"worst": shown(worst), "in layer": str(in_layer)}
