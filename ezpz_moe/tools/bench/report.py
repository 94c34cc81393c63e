"""Results as rows and lines for people, and as one JSON document. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ezpz_moe.cli import display
from ezpz_moe.tools.bench.results import DENSE, Figures, Measured


def title(measured: Measured) -> str:
    """The table's title."""
    E, D, F, R = measured.shape.sizes
    variables = " ".join(f"{key}={value}" for key, value in measured.allocator_variables.items())
    return (
        f"{measured.shape.name} (E={E} D={D} F={F} R={R}), {measured.routing}: "
        f"{min(measured.counts)} to {max(measured.counts)} rows per expert, the busiest with "
        f"{measured.skew:.3g}x the mean; {measured.dtype}, allocator {measured.allocator}"
        + (f" ({variables})" if variables else "")
    )


def rows(measured: Measured) -> Iterator[Mapping[str, str]]:
    """One row per contender, the fastest first."""
    stock = measured.stock
    # The median, because a few turns on a busy machine are much slower than the rest.
    by_time = sorted(measured.figures, key=lambda name: measured.figures[name].median())
    for name in by_time:
        figures = measured.figures[name]
        yield {
            "contender": name,
            "forward ms": f"{figures.median('forward'):.4g}",
            "fwd+bwd ms": f"{figures.median():.4g}",
            "quartiles": "{:.4g}-{:.4g}".format(*figures.quartiles()),
            "TFLOP/s": f"{measured.tflops(name):.3g}",
            f"speed / {stock or 'stock'}": display.number(measured.time_ratio(stock, name), ".2f"),
            "time / dense": display.number(measured.time_ratio(name, DENSE), ".2f"),
            "saved": display.memory(figures.saved_bytes),
            "peak": "-" if figures.peak_bytes is None else display.memory(figures.peak_bytes),
            "syncs": _syncs(figures),
        }


def left_out(measured: Measured) -> Iterator[str]:
    """The contenders that were not measured, and why."""
    for name, reasons in measured.left_out.items():
        yield f"left out: {name}: {'; '.join(reasons)}"


def remarks(measured: Measured) -> Iterator[str]:
    """The contenders that broke, and what the table does not show."""
    for name, reason in measured.failed.items():
        yield f"FAILED: {name}: {reason}"
    for name, figures in measured.figures.items():
        if figures.dropped:
            yield f"{name}: drops {figures.dropped:.1%} of the rows and does not compute them"


def document(
    results: Sequence[Measured], about: Mapping[str, Any], command: str, goals: Sequence[str]
) -> str:
    """Everything as JSON."""
    content = {
        "command": command,
        "environment": about,
        "goals": goals,
        "measured": [measured.as_json() for measured in results],
    }
    return json.dumps(_rounded(content), indent=1) + "\n"


def _syncs(figures: Figures) -> str:
    """The counted waits, or else what the contender declares."""
    if figures.syncs is not None:
        return str(figures.syncs)
    if figures.declares_syncs is None:
        return "-"
    return "yes (declared)" if figures.declares_syncs else "no (declared)"


def _rounded(value: Any) -> Any:
    """Round to five digits: no clock is more precise."""
    match value:
        case Mapping():
            return {key: _rounded(each) for key, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
        case float():
            return float(f"{value:.5g}")
    return value
