"""What a run's experts did in some steps.

Legend: E = routed experts, Z = zero-computation experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AwareDatetime, Field

from ezpz_moe.config.telemetry_schema import AlertThresholds
from ezpz_moe.telemetry.watched import Merged

# Bounds that no run reaches: figures and pictures compute with float64, which has an end.
_Count = Annotated[int, Field(ge=0, le=2**62)]
_Number = Annotated[int, Field(ge=0, le=2**40)]
_Counts = tuple[_Count, ...]


@dataclass(frozen=True)
class LayerRecord:
    """One MoE layer in the steps of a record, summed over them and over all ranks.

    ``layer``: its index in the model. ``tokens``: those routed, without padding. ``counts_E``:
    assignments to each routed expert, ``zero_counts_Z`` to each zero-computation expert (usually
    there are none). ``top1_probability`` and ``margin``: means over the tokens of the highest
    probability, and of its lead over the second. ``bias_norm``: the Euclidean norm of the selection
    bias. ``losses`` by name (``aux_loss``, ``mse_loss``, ``z_loss``), without their coefficients;
    ``scaled_losses`` with them. ``padding_waste``: rows of no token, or of padding, over all rows
    that were computed; with drops a lower bound. ``drop_rate``: assignments dropped over
    assignments. ``rank_max_over_mean``: under expert parallelism, the assignments of the busiest
    rank's experts over the mean of the ranks.
    ``probabilities_E``: means over the tokens of each routed expert's probability; empty in records
    of before there was this. ``rows_dispatched``: under expert parallelism, the rows that go to a
    rank, be it their own: a token once for each rank, or of a composed layer each assignment.
    ``rows_off_rank`` of them leave their rank, ``rows_off_node`` their node, if there are others.
    ``pairs``: the experts a < b and how many of the ``sampled_tokens`` chose both, the most
    frequent pairs first; those are of the last of the steps.
    """

    layer: _Number
    tokens: _Count
    counts_E: Annotated[_Counts, Field(min_length=1)]
    zero_counts_Z: _Counts
    top1_probability: float
    margin: float
    bias_norm: float | None
    losses: dict[str, float]
    scaled_losses: dict[str, float]
    padding_waste: float | None
    drop_rate: float | None
    rank_max_over_mean: float | None = None
    probabilities_E: tuple[float, ...] = ()
    rows_dispatched: _Count | None = None
    rows_off_rank: _Count | None = None
    rows_off_node: _Count | None = None
    pairs: tuple[tuple[_Number, _Number, _Count], ...] = ()
    sampled_tokens: _Count | None = None


@dataclass(frozen=True)
class StepRecord:
    """The MoE layers in the ``steps`` training steps that end with ``step``.

    ``loss`` and ``grad_norm`` are the trainer's at ``step``; ``backend`` was asked for;
    ``computed_by``: the backends that ``backend`` chose, if it chooses. ``thresholds`` are those of
    the run's alerts, and ``settings`` what they advise by (:mod:`.remedies`). ``warmup_steps``:
    of the learning rate. ``time``: when ``step`` ended. ``model`` is the flavor's name, and ``job``
    the job file, or what else the settings came from. Records of before there were these have none.
    ``merged``: what is left of the records that became this one, if it is :mod:`.merging`'s.
    """

    step: _Number
    steps: Annotated[int, Field(ge=1, le=2**40)]
    loss: float | None
    grad_norm: float | None
    backend: str
    layers: Annotated[tuple[LayerRecord, ...], Field(min_length=1)]
    # Kept with every record: a resumed run may have other thresholds, and plot needs no flavor.
    thresholds: AlertThresholds = field(default_factory=AlertThresholds)
    settings: dict[str, Any] = field(default_factory=dict)
    warmup_steps: _Number = 0
    computed_by: tuple[str, ...] = ()
    time: AwareDatetime | None = None
    model: str = ""
    job: str = ""
    merged: Merged | None = None
