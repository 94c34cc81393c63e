"""The picture of a run's ranks: how uneven their load is, and what is sent between them.

Import this only to draw: matplotlib is slow to import. Legend: S = records; L = MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ezpz_moe.telemetry.charts import WIDTH, draw_line, name_steps
from ezpz_moe.telemetry.figures import rank_figures
from ezpz_moe.telemetry.look import LIGHT, Look
from ezpz_moe.telemetry.record import StepRecord

_SENT = {"off_rank": "to another rank", "off_node": "to another node"}


def ranks_over_steps(records: Sequence[StepRecord], look: Look = LIGHT) -> Figure | None:
    """Draw the busiest rank's load over the mean, and the share of rows that is sent.

    None if no record is of a run with expert parallelism.
    """
    figures_SL = [[rank_figures(layer) for layer in record.layers] for record in records]
    found = {name for figures_L in figures_SL for figures in figures_L for name in figures}
    if "rank_max_over_mean" not in found:
        return None
    steps_S = [record.step for record in records]
    sent = {name: label for name, label in _SENT.items() if name in found}
    figure = Figure(figsize=(WIDTH, 2.8 * (1 + bool(sent)) + 0.4), layout="constrained")
    load, *others = figure.subplots(1 + bool(sent), 1, sharex=True, squeeze=False).flatten()
    busiest_SL = [_values(figures_L, "rank_max_over_mean") for figures_L in figures_SL]
    worst_S = [max(values, default=math.nan) for values in busiest_SL]
    draw_line(load, steps_S, worst_S, color=look.loss, label="worst layer")
    draw_line(load, steps_S, list(map(_mean, busiest_SL)), color=look.ink, label="mean of layers")
    name_steps(load, "busiest rank / mean", is_lowest=not sent)
    load.legend(frameon=False)
    for panel in others:
        for (name, label), colour in zip(sent.items(), (look.ink, look.cv), strict=False):
            share_S = [_mean(_values(figures_L, name)) for figures_L in figures_SL]
            draw_line(panel, steps_S, share_S, color=colour, label=label)
        name_steps(panel, "rows sent")
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    return figure


def _values(figures_L: Sequence[dict[str, float]], name: str) -> list[float]:
    return [figures[name] for figures in figures_L if name in figures]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
