"""Every figure that telemetry has, and every key of a line of ``telemetry.jsonl``.

The formulas and meanings are written by people, into the tables themselves.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tables

from ezpz_moe.config.routing_schema import LOSSES
from ezpz_moe.telemetry import json_lines
from ezpz_moe.telemetry.figures import WORST, layer_figures, over_layers
from ezpz_moe.telemetry.record import LayerRecord, StepRecord
from ezpz_moe.telemetry.scalars import scalars
from ezpz_moe.telemetry.watched import Merged, Watched

PAGE = "docs/reference/metrics.md"

_LAYER = LayerRecord(
    layer=1,
    tokens=8,
    counts_E=(8, 7, 0),
    zero_counts_Z=(1,),
    top1_probability=0.5,
    margin=0.25,
    bias_norm=0.1,
    losses=dict.fromkeys(LOSSES, 1.0),
    scaled_losses=dict.fromkeys(LOSSES, 0.01),
    padding_waste=0.1,
    drop_rate=0.1,
    rank_max_over_mean=1.0,
    probabilities_E=(0.5, 0.4, 0.05),
    rows_dispatched=8,
    rows_off_rank=4,
    rows_off_node=2,
    pairs=((0, 1, 7),),
    sampled_tokens=8,
)
"""A layer that has all that a layer can have, and no figure that is 0."""

_RECORD = StepRecord(
    step=1,
    steps=1,
    loss=1.0,
    grad_norm=1.0,
    backend="for_loop",
    layers=(_LAYER, _LAYER),
    merged=Merged(1, (), Watched({}, {}, {}, ())),
)


def made() -> dict[str, dict[str, str]]:
    """Return the tables by document and name."""
    formulas = ["formula", "even", "one expert alone", "source"]
    keys = tables.with_prose(PAGE, "keys of a line", _keys(), ["meaning"])
    return {
        PAGE: {
            "figures": tables.markdown(tables.with_prose(PAGE, "figures", _figures(), formulas)),
            "keys of a line": tables.markdown(keys),
        }
    }


def _figures() -> Iterator[dict[str, str]]:
    """Yield a row for each figure: those of a layer, then those of each of its experts."""
    figures = layer_figures(_LAYER)
    doubled = over_layers([figures, figures])
    for name, value in figures.items():
        worst = WORST.get(name)
        yield {
            "name": f"`{name}`",
            # Of two layers alike, a mean is that of one.
            "over layers": "mean" if np.isclose(doubled[name], value) else "sum",
            "worst": "" if worst is None else worst.__name__.removeprefix("a"),
        }
    of_experts = [name for name in scalars(_RECORD, "per_expert") if "/expert_0/" in name]
    for name in dict.fromkeys(name.rpartition("/")[2] for name in of_experts):
        yield {"name": f"`{name}`", "over layers": "of each expert", "worst": ""}


def _keys() -> Iterator[dict[str, str]]:
    """Yield a row for each key of a line, and for each of a layer in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, json_lines.FILE_NAME)
        json_lines.append(path, _RECORD)
        line: dict[str, Any] = json.loads(path.read_text())
    (layer, _) = line.pop("layers")
    yield from ({"key": f"`{key}`"} for key in line)
    yield from ({"key": f"`layers[].{key}`"} for key in layer)
