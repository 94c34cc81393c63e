"""How long a step of a cut takes on a machine, term by term. Seconds.

Time is FLOPs over the rate that their class of operators reaches, and bytes over links
(:func:`.machine.seconds`). docs/guides/plan.md states the model and what is not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ezpz_moe.hosts.accounting import BACKWARD
from ezpz_moe.hosts.model_sheet import EMBEDDINGS, HEAD, ModelSheet, Part
from ezpz_moe.tools.planning.cuts import Cut
from ezpz_moe.tools.planning.machine import Machine, seconds, tier_in_words
from ezpz_moe.tools.planning.memory import expert_numbers, stage_states, unlike_stages
from ezpz_moe.tools.planning.traffic import EP, FSDP, HSDP, PP, TP, traffic

PRODUCTS, EXPERTS, ATTENTION = "dense products", "routed experts", "attention scores"
RECOMPUTED, IMBALANCE = "recomputation", "imbalance of the experts"
BUBBLE, OPTIMIZER = "pipeline bubble", "optimizer"

_COMPUTE = (PRODUCTS, EXPERTS, ATTENTION, RECOMPUTED, IMBALANCE)
_OVERLAPPED = (FSDP, HSDP)
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
    found = []
    for stage, parts in unlike_stages(sheet, cut.pp).items():
        terms = compute_terms(sheet, cut, parts, on, imbalance)
        for each in traffic(sheet, cut, parts, stage):
            tier = tier_in_words(ranks_per_node, each.size, each.stride)
            name = f"{each.purpose}: {each.kind} {tier}"
            one = seconds(on, ranks_per_node, each.kind, each.size, each.stride, each.sent)
            waits = imbalance if each.purpose == EP else 1
            terms[name] = terms.get(name, 0) + each.times * one * waits
        passed = _PASSES_OVER_STATES * stage_states(sheet, cut, parts).parameters
        terms[OPTIMIZER] = passed * sheet.job.weight_bytes / on.memory.bandwidth
        found.append(_stage_time(cut, terms))
    return max(found, key=lambda time: time.predicted)


def compute_terms(
    sheet: ModelSheet, cut: Cut, parts: Counter[Part], on: Machine, imbalance: float
) -> dict[str, float]:
    """Return seconds of computation in a step, by class of operators."""
    forward = dict.fromkeys((PRODUCTS, EXPERTS, ATTENTION), 0.0)
    again = 0.0
    for part, times in parts.items():
        own = _forward_seconds(sheet, cut, part, on)
        for name, one in own.items():
            forward[name] += times * cut.microbatches * one
        # Checkpointing wraps layers, and nothing around them.
        if cut.checkpointing == "full" and part not in (
            sheet.parts.get(EMBEDDINGS),
            sheet.parts.get(HEAD),
        ):
            again += times * cut.microbatches * sum(own.values())
    terms = {name: (1 + BACKWARD) * each for name, each in forward.items()}
    if again:
        terms[RECOMPUTED] = again
    if imbalance > 1:
        terms[IMBALANCE] = (imbalance - 1) * terms[EXPERTS]
    return terms


def _forward_seconds(sheet: ModelSheet, cut: Cut, part: Part, on: Machine) -> dict[str, float]:
    """Return seconds of a part's forward for a microbatch, by class of operators."""
    tokens = cut.microbatch * sheet.job.seq_len
    peak = on.compute.bfloat16 if sheet.job.compute_bytes == 2 else on.compute.float32
    # Few rows for each expert: then reading their weights takes longer than multiplying.
    read = expert_numbers(cut.layout, part) * sheet.job.compute_bytes / on.memory.bandwidth
    multiplied = tokens * _expert_flops(part) / cut.tp / peak / on.compute.experts
    return {
        PRODUCTS: tokens * _product_flops(cut, part) / peak / on.compute.products,
        EXPERTS: max(multiplied, read),
        ATTENTION: tokens * part.scores / cut.tp / peak / on.compute.attention,
    }


def _product_flops(cut: Cut, part: Part) -> float:
    """Return a rank's forward FLOPs per token in linear layers; what is not split, all compute."""
    return sum(
        weight.forward / (1 if weight.split is None else cut.tp)
        for weight in part.weights
        if not weight.is_expert
    )


def _expert_flops(part: Part) -> float:
    return sum(weight.forward for weight in part.weights if weight.is_expert)


def _stage_time(cut: Cut, terms: dict[str, float]) -> StepTime:
    """Add up a stage's terms, with the bubble: the other stages' share before and after it."""
    computed = sum(terms.get(name, 0) for name in _COMPUTE)
    waited = sum(s for name, s in terms.items() if name.startswith((f"{EP}:", f"{TP}:", f"{PP}:")))
    hidden = sum(
        s for name, s in terms.items() if name.startswith(tuple(f"{o}:" for o in _OVERLAPPED))
    )
    bubble = (cut.pp - 1) / cut.microbatches
    if cut.pp > 1:
        terms[BUBBLE] = bubble * (computed + waited)
    after = terms.get(OPTIMIZER, 0)
    predicted = (1 + bubble) * (computed + waited) + max(0.0, hidden - computed) + after
    best = max((1 + bubble) * computed, waited + hidden) + after
    worst = (1 + bubble) * (computed + waited) + hidden + after
    return StepTime(dict(terms), predicted, best, worst)
