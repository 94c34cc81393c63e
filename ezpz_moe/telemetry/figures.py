"""Figures of expert load: pure functions of how many assignments each expert got.

Legend: E = routed experts, Z = zero-computation experts, L = MoE layers. ``counts_E`` are
assignments: a token that chooses k experts counts k times. All figures are float64, without a unit
unless stated. If nothing was assigned, a ratio does not exist and is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ezpz_moe.config.routing_schema import REPORTED_LOSSES
from ezpz_moe.telemetry.record import LayerRecord

Counts = Sequence[int]

# Which end of a figure is the bad one; NaN is always bad.
WORST: dict[str, Callable[[Sequence[float]], float]] = {
    "cv": np.max,
    "max_over_mean": np.max,
    "max_violation": np.max,
    "rank_max_over_mean": np.max,
    "off_rank": np.max,
    "off_node": np.max,
    "min_over_mean": np.min,
    "p50_over_mean": np.min,
    "p95_over_mean": np.max,
    "entropy": np.min,
    "effective_fraction": np.min,
    "dead_experts": np.max,
    "bias_norm": np.max,
    "padding_waste": np.max,
    "drop_rate": np.max,
    **dict.fromkeys(REPORTED_LOSSES, np.max),
}
# A mean of dead experts would hide one dead expert among many layers.
_SUMMED = ("dead_experts",)


def selection_frequency(counts_E: Counts) -> npt.NDArray[np.float64]:
    """Return the share of the assignments that each expert got: [E], sums to 1; 1/E is even.

    This is f_i of the Switch Transformer's balance loss (arXiv 2101.03961, equation 5) for top-1.
    """
    counts = np.asarray(counts_E, dtype=np.float64)
    total = counts.sum()
    # NaN, not 0: 0 would claim that every expert is dead.
    return counts / total if total else np.full(counts.shape, math.nan)


def relative_load(counts_E: Counts) -> npt.NDArray[np.float64]:
    """Return each expert's count over the mean count: [E]; 1 is even, E is all."""
    return selection_frequency(counts_E) * len(counts_E)


def coefficient_of_variation(counts_E: Counts) -> float:
    """Return population standard deviation over mean; 0 is even, sqrt(E - 1) is one expert alone.

    Its square is the importance and load loss of the sparsely-gated MoE layer (arXiv 1701.06538,
    section 4).
    """
    return float(relative_load(counts_E).std())


def max_over_mean(counts_E: Counts) -> float:
    """Return the busiest expert's count over the mean; 1 is even, E is one expert alone."""
    return float(relative_load(counts_E).max())


def max_violation(counts_E: Counts) -> float:
    """Return MaxVio of Loss-Free Balancing (arXiv 2408.15664): max over mean, less 1."""
    return max_over_mean(counts_E) - 1.0


def min_over_mean(counts_E: Counts) -> float:
    """Return the idlest expert's count over the mean; 1 is even, 0 is a dead expert."""
    return float(relative_load(counts_E).min())


def percentile_over_mean(counts_E: Counts, percent: float) -> float:
    """Return a percentile of the counts, interpolated linearly between two, over their mean."""
    return float(np.percentile(relative_load(counts_E), percent))


def entropy(counts_E: Counts) -> float:
    """Return the Shannon entropy ``-sum f ln f`` of the frequencies, in nats; ln E is even."""
    frequency = selection_frequency(counts_E)
    if np.isnan(frequency).any():
        return math.nan
    # 0 ln 0 is 0 in the limit, but NaN in floating point.
    used = frequency[frequency > 0]
    # Natural logarithm: exp() of the result is then a number of experts.
    return float(-(used * np.log(used)).sum()) + 0.0  # turns -0.0 into 0.0


def effective_experts(counts_E: Counts) -> float:
    """Return ``exp(entropy)``: how many equally busy experts would have this entropy; E is even.

    This is the perplexity of the frequencies, the Hill number of order 1. If a token chooses k
    distinct experts, no frequency is above 1/k, so it is at least k.
    """
    return math.exp(entropy(counts_E))


def effective_fraction(counts_E: Counts) -> float:
    """Return ``exp(entropy) / E``: the share of experts in effective use; 1 is even."""
    return effective_experts(counts_E) / len(counts_E)


def dead_experts(counts_E: Counts) -> tuple[int, ...]:
    """Return the indices of the experts that got no assignment."""
    return tuple(expert for expert, count in enumerate(counts_E) if count == 0)


def load_figures(counts_E: Counts) -> dict[str, float]:
    """Return every figure of a layer's counts; only dead_experts if nothing was assigned."""
    dead = {"dead_experts": float(len(dead_experts(counts_E)))}
    if not sum(counts_E):
        return dead
    return {
        "cv": coefficient_of_variation(counts_E),
        "max_over_mean": max_over_mean(counts_E),
        "max_violation": max_violation(counts_E),
        "min_over_mean": min_over_mean(counts_E),
        "p50_over_mean": percentile_over_mean(counts_E, 50),
        "p95_over_mean": percentile_over_mean(counts_E, 95),
        "entropy": entropy(counts_E),
        "effective_fraction": effective_fraction(counts_E),
        **dead,
    }


def layer_figures(layer: LayerRecord, steps: int = 1) -> dict[str, float]:
    """Return every figure of one layer by name: its load, its router, its losses and its backend.

    ``tokens_per_expert`` is the mean number of assignments per expert in one of the ``steps``;
    ``zero_fraction`` is the share of the assignments that went to zero-computation experts. Figures
    that the layer does not have are left out; a layer that saw no tokens has only its bias.
    """
    figures = _if_given(bias_norm=layer.bias_norm)
    # A bias exists without tokens; a load and means over tokens do not.
    if not layer.tokens:
        return figures
    routed, zero = sum(layer.counts_E), sum(layer.zero_counts_Z)
    figures |= load_figures(layer.counts_E)
    figures |= rank_figures(layer)
    figures["tokens_per_expert"] = routed / len(layer.counts_E) / steps
    if layer.zero_counts_Z and routed + zero:
        figures["zero_fraction"] = zero / (routed + zero)
    figures["top1_probability"] = layer.top1_probability
    figures["margin"] = layer.margin
    figures |= layer.losses
    figures |= {f"{name}_scaled": value for name, value in layer.scaled_losses.items()}
    return figures | _if_given(padding_waste=layer.padding_waste, drop_rate=layer.drop_rate)


def rank_figures(layer: LayerRecord) -> dict[str, float]:
    """Return what expert parallelism makes of the load: empty without it.

    ``off_rank`` and ``off_node`` are the shares of the rows that leave their rank, and their node.
    """
    figures = _if_given(rank_max_over_mean=layer.rank_max_over_mean)
    if layer.rows_dispatched:
        leaving = _if_given(off_rank=layer.rows_off_rank, off_node=layer.rows_off_node)
        figures |= {name: rows / layer.rows_dispatched for name, rows in leaving.items()}
    return figures


def use_of_rows(given: int, computed: int, dropped: int, counted: int) -> dict[str, float]:
    """Return what a layer's backend did with the tokens it was given, at least one.

    ``padding_waste`` is the share of the computed rows that belonged to nobody or to padding,
    ``drop_rate`` the share of the tokens that were not computed.

    Args:
        given: tokens given to the backend, padding among them if it is dispatched.
        computed: rows that it computed.
        dropped: tokens that it did not compute.
        counted: tokens that are not padding.
    """
    # Nobody knows which of the dropped tokens were padding: as many as possible count as such, and
    # the waste is the least that it can be.
    useful = min(counted, given - dropped)
    return {"padding_waste": 1 - useful / computed, "drop_rate": dropped / given}


@np.errstate(over="ignore")  # a mean beyond all numbers is infinite, and shown as such
def over_layers(figures_L: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return each figure's mean over the layers that have it, and the worst as ``<name>_worst``.

    ``dead_experts`` is the sum over the layers. Figures without a bad end, such as the router's
    confidence, have no worst.
    """
    summary = {}
    # Layers may lack figures (no zero-computation experts, no tokens): average over those that have
    # them.
    for name in dict.fromkeys(name for figures in figures_L for name in figures):
        values = [figures[name] for figures in figures_L if name in figures]
        summary[name] = float(np.sum(values) if name in _SUMMED else np.mean(values))
        if worst := WORST.get(name):
            summary[f"{name}_worst"] = float(worst(values))
    return summary


def _if_given(**figures: float | None) -> dict[str, float]:
    return {name: value for name, value in figures.items() if value is not None}
