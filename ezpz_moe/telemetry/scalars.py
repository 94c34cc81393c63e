"""A record as named numbers, for the loggers of a trainer."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from ezpz_moe.telemetry.figures import layer_figures, over_layers, selection_frequency
from ezpz_moe.telemetry.record import LayerRecord, StepRecord

Detail = Literal["brief", "per_layer", "per_expert"]


def scalars(
    record: StepRecord, detail: Detail = "brief", *, prefix: str = "moe"
) -> dict[str, float]:
    """Return the record's figures, by the names under which they are logged, after ``prefix``.

    ``brief``: over layers, ``moe/cv`` (mean) and ``moe/cv_worst``. ``per_layer`` adds
    ``moe/layer_3/cv``, and ``per_expert`` also adds ``moe/layer_3/expert_7/frequency``, which sums
    to 1 over a layer's experts, and its mean ``probability``. Figures that do not exist, such as
    those of a layer without tokens, are left out.
    """
    figures_L = [layer_figures(layer, record.steps) for layer in record.layers]
    values = _under(prefix, over_layers(figures_L))
    if detail != "brief":
        for layer, figures in zip(record.layers, figures_L, strict=True):
            values |= _under(f"{prefix}/layer_{layer.layer}", figures)
    # Layers times experts: thousands of scalars, which is why the default is brief.
    if detail == "per_expert":
        for layer in record.layers:
            values |= _under(f"{prefix}/layer_{layer.layer}", _of_experts(layer))
    return values


def _of_experts(layer: LayerRecord) -> dict[str, float]:
    of_each = {"frequency": selection_frequency(layer.counts_E)}
    if layer.tokens:
        of_each["probability"] = np.array(layer.probabilities_E)
    return {
        f"expert_{expert}/{name}": float(value)
        for name, values_E in of_each.items()
        for expert, value in enumerate(values_E)
        # Loggers draw NaN as a gap or refuse it: leave it out.
        if not math.isnan(value)
    }


def _under(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in figures.items()}
