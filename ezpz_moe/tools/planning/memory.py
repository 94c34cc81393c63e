"""What a rank of a cut holds, in bytes, by arithmetic.

Parameters and states are those that :mod:`ezpz_moe.tools.preflight` finds when it builds the rank:
a test compares them. Activations are estimated.

Legend: T = tokens of a microbatch, D = model dimension, F = hidden size of an FFN, K = experts per
token, V = vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

from ezpz_moe.hosts.dry_run import STATES_PER_PARAMETER
from ezpz_moe.hosts.model_sheet import EMBEDDINGS, HEAD, ModelSheet, Part, Weight
from ezpz_moe.tools.memory import microbatches_in_flight
from ezpz_moe.tools.planning.cuts import Cut, expert_group, shards_width, stages

_LOGIT_BYTES = 4
"""The loss keeps the log-softmax of logits in float32."""
_SCORE_BYTES = 4
"""Attention that is written out computes its scores in float32."""


@dataclass(frozen=True)
class Held:
    """What the first rank of a pipeline stage holds.

    Attributes:
        parameters: numbers in its shards.
        states: bytes of weights, gradients and optimizer states.
        activations: estimated bytes of what forward leaves for backward.
        gathered: bytes of the weights that FSDP has gathered at the same time.
    """

    parameters: int
    states: int
    activations: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.states + self.activations + self.gathered


def tp_shape(weight: Weight, cut: Cut) -> tuple[int, ...]:
    """Return the shape that the first rank has of a weight before FSDP shards it."""
    shape = list(weight.shape)
    if not shape:
        return ()
    if weight.is_expert and cut.ep > 1:
        shape[0] = ceil(shape[0] / cut.ep)
    elif weight.split is not None:
        shape[weight.split] = ceil(shape[weight.split] / cut.tp)
    return tuple(shape)


def shard_shape(sheet: ModelSheet, part: Part, weight: Weight, cut: Cut) -> tuple[int, ...]:
    """Return the shape of the first rank's shard of a weight.

    FSDP2 splits as ``torch.chunk`` does: the first rank has the most rows.
    """
    shape = list(tp_shape(weight, cut))
    if not shape:
        return ()
    dim = int(weight.is_expert and shards_width(sheet, cut, part))
    ranks = expert_group(cut) if weight.is_expert else cut.dp_shard
    shape[dim] = ceil(shape[dim] / ranks)
    return tuple(shape)


def numel(shape: tuple[int, ...]) -> int:
    """Return how many numbers a shape has; () stands for a weight that another part counts."""
    return prod(shape) if shape else 0


def states(sheet: ModelSheet, cut: Cut) -> list[Held]:
    """Return parameters and states of the first rank of every pipeline stage."""
    return [stage_states(sheet, cut, parts) for parts in stage_parts(sheet, cut.pp)]


@cache
def stage_parts(sheet: ModelSheet, pp: int) -> list[Counter[Part]]:
    """Return of every pipeline stage its parts, and how often each is there."""
    return [Counter(sheet.parts[name] for name in own) for own in stages(sheet, pp) or ()]


@cache
def unlike_stages(sheet: ModelSheet, pp: int) -> dict[int, Counter[Part]]:
    """Return the stages of which no earlier one has the same parts, by number."""
    found: dict[int, Counter[Part]] = {}
    for stage, parts in enumerate(stage_parts(sheet, pp)):
        if parts not in found.values():
            found[stage] = parts
    return found


def stage_states(sheet: ModelSheet, cut: Cut, parts: Counter[Part]) -> Held:
    """Return parameters and states of the first rank of a stage."""
    parameters = held = 0
    for part, times in parts.items():
        number, learned = shard_numbers(sheet, cut.layout, part)
        parameters += times * number
        held += times * (number + (STATES_PER_PARAMETER - 1) * learned)
    return Held(parameters, held * sheet.job.weight_bytes)


@cache
def shard_numbers(
    sheet: ModelSheet, layout: Cut, part: Part, is_expert: bool | None = None
) -> tuple[int, int]:
    """Return the numbers in the first rank's shards of a part, and those of them that learn.

    Args:
        sheet: the job's.
        layout: of a cut.
        part: of the model.
        is_expert: whether only weights of routed experts count, or only others; None: all.
    """
    number = learned = 0
    for weight in part.weights:
        if is_expert in (None, weight.is_expert):
            size = numel(shard_shape(sheet, part, weight, layout))
            number, learned = number + size, learned + size * weight.learns
    return number, learned


def fullest(sheet: ModelSheet, cut: Cut, imbalance: float = 1.0) -> Held:
    """Return what the fullest stage holds.

    Args:
        sheet: the job's.
        cut: a legal one.
        imbalance: rows of the busiest rank's experts over the mean.
    """
    found = []
    # Of stages that are alike the earliest holds the most microbatches.
    for stage, parts in unlike_stages(sheet, cut.pp).items():
        held = stage_states(sheet, cut, parts)
        again = _again_bytes(sheet, cut, parts, imbalance)
        activations = int(left_bytes(sheet, cut, stage, imbalance) + again)
        found.append(Held(held.parameters, held.states, activations, _gathered(sheet, cut, parts)))
    return max(found, key=lambda held: held.total)


def left_bytes(sheet: ModelSheet, cut: Cut, stage: int, imbalance: float = 1.0) -> float:
    """Return estimated bytes that forward leaves for backward in a stage.

    Those of all microbatches that it holds, as ``ezpz-moe describe`` measures them.
    """
    in_flight = microbatches_in_flight(sheet.job.schedule, stage, cut.pp, cut.microbatches)
    kept = sum(
        times * kept_bytes(sheet, cut, part, cut.checkpointing, imbalance)
        for part, times in stage_parts(sheet, cut.pp)[stage].items()
    )
    return in_flight * kept + _loss_bytes(sheet, cut, stage)


def _again_bytes(sheet: ModelSheet, cut: Cut, parts: Counter[Part], imbalance: float) -> float:
    """Return estimated bytes that backward computes again, of one layer at a time.

    What checkpointing has kept of the layer is not computed: so none of its modes holds more than
    the one that keeps more.
    """
    return max(
        kept_bytes(sheet, cut, part, "none", imbalance)
        - kept_bytes(sheet, cut, part, cut.checkpointing, imbalance)
        for part in parts
    )


def kept_bytes(
    sheet: ModelSheet, cut: Cut, part: Part, checkpointing: str, imbalance: float
) -> float:
    """Return estimated bytes that forward of a microbatch leaves of a part for backward.

    Without checkpointing the inputs and outputs of products, with "selective" the outputs, with
    "full" a layer's input.
    """
    if part is sheet.parts.get(EMBEDDINGS):
        return 0  # what it returns is the first layer's input
    tokens, size = cut.microbatch * sheet.job.seq_len, sheet.job.compute_bytes
    stream = sheet.dim / (cut.tp if sheet.job.sequence_parallel else 1)
    if part is sheet.parts.get(HEAD) or checkpointing == "full":
        return tokens * size * stream
    is_all = checkpointing == "none"
    numbers = stream
    for weight in part.weights:
        if not weight.used:
            continue
        if weight.is_expert:
            numbers += imbalance * _of_experts(part, weight, is_all) / cut.tp
        else:
            taken, given = _in_and_out(weight, cut)
            numbers += given + is_all * taken
    return tokens * (size * numbers + _held_scores_bytes(sheet, cut, part, is_all))


def _held_scores_bytes(sheet: ModelSheet, cut: Cut, part: Part, is_all: bool) -> float:
    """Return the bytes per token of the scores that written-out attention leaves for backward.

    Without checkpointing these are the masked scores, their softmax, and the softmax rounded to the
    dtype of products, if that is another; with "selective" the product of queries and keys.
    """
    computed = sheet.job.compute_bytes
    rounded = computed if computed < _SCORE_BYTES else 0
    each = 2 * _SCORE_BYTES + rounded if is_all else _SCORE_BYTES
    return part.held_scores / cut.tp * each


def _in_and_out(weight: Weight, cut: Cut) -> tuple[float, float]:
    """Return the numbers per token that a rank has of a product's input and output."""
    given, taken = weight.shape[-2:] if weight.shape else (0, 0)
    if weight.split == 0:
        return taken, given / cut.tp
    if weight.split == 1:
        return taken / cut.tp, given / cut.tp
    return taken, given


def _of_experts(part: Part, weight: Weight, is_all: bool) -> float:
    """Return the numbers per token of one stack of experts' matrices [E, out, in]."""
    assert part.routed is not None
    (given, taken), rows = weight.shape[-2:], part.routed.top_k
    if part.routed.is_one_node:
        # One node keeps gate and up of every row, and returns one row for a token.
        return rows * given if weight.split == 1 else given
    return rows * (given + is_all * taken)


def _loss_bytes(sheet: ModelSheet, cut: Cut, stage: int) -> float:
    """Return the bytes that the loss keeps of one chunk's logits, and of their gradient."""
    head = sheet.parts.get(HEAD)
    if stage != cut.pp - 1 or head is None:
        return 0
    tokens = cut.microbatch * sheet.job.seq_len / sheet.job.loss_chunks
    return tokens * head.weights[0].used * _vocabulary(head) / cut.tp * 2 * _LOGIT_BYTES


def _vocabulary(head: Part) -> int:
    return head.weights[0].shape[0] if head.weights[0].shape else 0


def reshards(sheet: ModelSheet, cut: Cut) -> bool:
    """Return whether FSDP lets go of a layer's weights after its forward."""
    if sheet.job.reshards == "default":
        return cut.pp == 1
    return sheet.job.reshards == "always"


def _gathered(sheet: ModelSheet, cut: Cut, parts: Counter[Part]) -> int:
    """Return bytes of gathered weights: of two parts at a time, or of all if none lets go."""
    sizes = [_gathered_numbers(cut.layout, part) for part in parts.elements()]
    at_once = sorted(sizes)[-2:] if reshards(sheet, cut) else sizes
    return sum(at_once) * sheet.job.compute_bytes


@cache
def expert_numbers(layout: Cut, part: Part) -> int:
    """Return how many numbers of routed experts a rank multiplies by, gathered."""
    return sum(numel(tp_shape(each, layout)) for each in part.weights if each.is_expert)


@cache
def _gathered_numbers(layout: Cut, part: Part) -> int:
    return sum(numel(tp_shape(each, layout)) for each in part.weights if _is_sharded(each, layout))


def _is_sharded(weight: Weight, cut: Cut) -> bool:
    return (expert_group(cut) if weight.is_expert else cut.dp_shard) > 1
