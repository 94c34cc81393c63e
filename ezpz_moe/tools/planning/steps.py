"""How long a step of a cut takes on a machine, term by term. Seconds.

Time is FLOPs over the rate that their class of operators reaches, and bytes over links
(:func:`.links.seconds`). docs/guides/plan.md states the model and what is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from ezpz_moe.hosts.accounting import BACKWARD
from ezpz_moe.hosts.model_sheet import EMBEDDINGS, HEAD, ModelSheet, Part
from ezpz_moe.tools.planning.cuts import Cut
from ezpz_moe.tools.planning.links import seconds, tier_in_words
from ezpz_moe.tools.planning.machine import Machine
from ezpz_moe.tools.planning.memory import (
    expert_numbers,
    kept_bytes,
    stage_parts,
    stage_states,
    unlike_stages,
)
from ezpz_moe.tools.planning.traffic import (
    EP,
    FSDP,
    GATHER,
    HSDP,
    PP,
    REDUCE,
    SCATTER,
    TP,
    traffic,
)

PRODUCTS, EXPERTS, ATTENTION = "dense products", "routed experts", "attention scores"
BETWEEN = "between products"
RECOMPUTED, IMBALANCE = "recomputation", "imbalance of the experts"
BUBBLE, OPTIMIZER, COPIES = "pipeline bubble", "optimizer", "copies of FSDP"

_COMPUTE = (PRODUCTS, EXPERTS, ATTENTION, BETWEEN, RECOMPUTED, IMBALANCE, COPIES)
_OVERLAPPED = (FSDP, HSDP)
_PASSES_BETWEEN = 4
"""Over what products take and give: norms, RoPE, activations, residuals, casts and copies read and
write it in forward. An assumption for eager kernels; compiled ones need less."""
_PASSES_OF_FSDP = {(FSDP, GATHER): 2, (FSDP, SCATTER): 4, (HSDP, REDUCE): 4}
"""Out of what was gathered into each weight; of a gradient into what is added up, and divided."""
_PASSES_OVER_STATES = 7
"""Of AdamW over numbers as large as a weight: four are read, three written."""


@dataclass(frozen=True)
class StepTime:
    """The time of a step.

    Attributes:
        terms: name -> seconds of the slowest stage, as if nothing overlapped.
        predicted: seconds, with FSDP's collectives beside computation, as the host has them.
        best: seconds, if all collectives overlapped with computation.
        worst: seconds, if none did.
    """

    terms: Mapping[str, float]
    predicted: float
    best: float
    worst: float

    @property
    def limited_by(self) -> str:
        """The largest term."""
        return max(self.terms, key=lambda name: self.terms[name])


def step_time(
    sheet: ModelSheet, cut: Cut, on: Machine, ranks_per_node: int, imbalance: float
) -> StepTime:
    """Return the time of a step.

    Args:
        sheet: the job's.
        cut: a legal one.
        on: the machine.
        ranks_per_node: ranks that share a node.
        imbalance: rows of the busiest rank's experts over the mean.
    """
    found = {
        stage: _terms(sheet, cut, parts, stage, on, ranks_per_node, imbalance)
        for stage, parts in unlike_stages(sheet, cut.pp).items()
    }
    alike = _stages_alike(sheet, cut.pp)
    mean = sum(alike[stage] * _in_order(terms) for stage, terms in found.items()) / cut.pp
    times = (_stage_time(cut, terms, on, mean) for terms in found.values())
    return max(times, key=lambda time: time.predicted)


@cache
def _stages_alike(sheet: ModelSheet, pp: int) -> dict[int, int]:
    """Return how many stages have the parts of each of :func:`.unlike_stages`."""
    every = stage_parts(sheet, pp)
    return {stage: every.count(parts) for stage, parts in unlike_stages(sheet, pp).items()}


def _terms(
    sheet: ModelSheet,
    cut: Cut,
    parts: Counter[Part],
    stage: int,
    on: Machine,
    ranks_per_node: int,
    imbalance: float,
) -> dict[str, float]:
    """Return seconds of a stage, by term, with arguments as in :func:`step_time`."""
    # Where ranks share cores, those that wait for the busiest one leave it theirs.
    imbalance = max(1.0, imbalance / on.compute.alone)
    terms = compute_terms(sheet, cut, parts, on, imbalance)
    copied = 0.0
    for each in traffic(sheet, cut, parts, stage):
        tier = tier_in_words(ranks_per_node, each.size, each.stride)
        name = f"{each.purpose}: {each.kind} {tier}"
        one = seconds(on, ranks_per_node, each.kind, each.size, each.stride, each.sent)
        waits = imbalance if each.purpose == EP else 1
        terms[name] = terms.get(name, 0) + each.times * one * waits
        copied += each.bytes_of_step * _PASSES_OF_FSDP.get((each.purpose, each.kind), 0)
    terms[COPIES] = copied / on.memory.bandwidth
    passed = _PASSES_OVER_STATES * stage_states(sheet, cut, parts).parameters
    terms[OPTIMIZER] = passed * sheet.job.weight_bytes / on.memory.bandwidth
    return terms


def compute_terms(
    sheet: ModelSheet, cut: Cut, parts: Counter[Part], on: Machine, imbalance: float
) -> dict[str, float]:
    """Return seconds of computation in a step, by class of operators."""
    forward = dict.fromkeys((PRODUCTS, EXPERTS, ATTENTION, BETWEEN), 0.0)
    again = 0.0
    for part, times in parts.items():
        own = _forward_seconds(sheet, cut, part, on)
        for name, one in own.items():
            forward[name] += times * cut.microbatches * one
        again += times * cut.microbatches * _again(sheet, cut, part, own)
    terms = {name: (1 + BACKWARD) * each for name, each in forward.items()}
    if again:
        terms[RECOMPUTED] = again
    if imbalance > 1:
        terms[IMBALANCE] = (imbalance - 1) * terms[EXPERTS]
    return terms


def _again(sheet: ModelSheet, cut: Cut, part: Part, own: Mapping[str, float]) -> float:
    """Return seconds of a part's forward that backward computes again for a microbatch."""
    # Checkpointing wraps layers, and nothing around them.
    if part in (sheet.parts.get(EMBEDDINGS), sheet.parts.get(HEAD)):
        return 0.0
    # "selective" keeps what products and attention give.
    return {"none": 0.0, "selective": own[BETWEEN], "full": sum(own.values())}[cut.checkpointing]


def _forward_seconds(sheet: ModelSheet, cut: Cut, part: Part, on: Machine) -> dict[str, float]:
    """Return seconds of a part's forward for a microbatch, by class of operators."""
    tokens = cut.microbatch * sheet.job.seq_len
    peak = on.compute.bfloat16 if sheet.job.compute_bytes == 2 else on.compute.float32
    # Few rows for each expert: then reading their weights takes longer than multiplying.
    read = expert_numbers(cut.layout, part) * sheet.job.compute_bytes / on.memory.bandwidth
    multiplied = tokens * _expert_flops(part) / cut.tp / peak / _of_experts(sheet, cut, part, on)
    return {
        PRODUCTS: sum(_product_seconds(each, on) for each in _products(cut, part, tokens)) / peak,
        EXPERTS: max(multiplied, read),
        ATTENTION: tokens * part.scores / cut.tp / peak / on.compute.attention,
        BETWEEN: _PASSES_BETWEEN * kept_bytes(sheet, cut, part, "none", 1.0) / on.memory.bandwidth,
    }


def _products(cut: Cut, part: Part, tokens: int) -> Iterator[float]:
    """Yield the FLOPs of each of a rank's products; what is not split, all ranks compute."""
    for weight in part.weights:
        if weight.used and not weight.is_expert:
            yield tokens * weight.forward / (1 if weight.split is None else cut.tp)


def _product_seconds(flops: float, on: Machine) -> float:
    """Return how long a product takes, times the peak."""
    reached = on.compute.by_flops.at(flops) if on.compute.by_flops else 1.0
    return flops / reached / on.compute.products


def _of_experts(sheet: ModelSheet, cut: Cut, part: Part, on: Machine) -> float:
    """Return the share of the peak that a layer's experts reach."""
    measured = on.compute.backends.get(sheet.backend)
    if measured is None or part.routed is None:
        return on.compute.experts
    rows = cut.microbatch * sheet.job.seq_len * part.routed.top_k / part.routed.num_experts
    # Every rank of a group sends its tokens; with tensor parallelism those of its sequence shard.
    return measured.at(rows * cut.ep / cut.tp if cut.ep > 1 else rows)


def _expert_flops(part: Part) -> float:
    return sum(weight.forward for weight in part.weights if weight.is_expert)


def _in_order(terms: Mapping[str, float]) -> float:
    """Return seconds of what a stage does one after the other for its microbatches."""
    return _computed(terms) + sum(_of(terms, EP, TP, PP))


def _computed(terms: Mapping[str, float]) -> float:
    return sum(terms.get(name, 0) for name in _COMPUTE)


def _of(terms: Mapping[str, float], *purposes: str) -> Iterator[float]:
    """Yield seconds of the collectives of these purposes."""
    starts = tuple(f"{purpose}:" for purpose in purposes)
    return (seconds for name, seconds in terms.items() if name.startswith(starts))


def _stage_time(cut: Cut, terms: dict[str, float], on: Machine, mean: float) -> StepTime:
    """Add up a stage's terms, with the bubble: the other stages' share before and after it.

    Where ranks share cores, stages that wait leave theirs to others: then a step takes no less than
    the ``mean`` of all stages, and a stage that runs alone is faster.
    """
    computed, ordered, hidden = _computed(terms), _in_order(terms), sum(_of(terms, *_OVERLAPPED))
    filled = (1 + (cut.pp - 1) / cut.microbatches) / (on.compute.alone if cut.pp > 1 else 1)
    stage = max(mean, filled * ordered)
    if cut.pp > 1:
        terms[BUBBLE] = max(0.0, stage - ordered)
    after = terms.get(OPTIMIZER, 0)
    predicted = stage + hidden - on.overlap * min(hidden, computed) + after
    best = max(stage * computed / ordered, ordered - computed + hidden) + after
    return StepTime(dict(terms), predicted, best, stage + hidden + after)
