"""What a rank of a cut sends in a step: every collective, with its bytes.

Tests count the same in real runs. Not here: collectives of a few numbers, such as losses, gradient
norms and counts.

Legend: T = tokens of a microbatch, D = model dimension, K = experts per token, S = rows sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ezpz_moe.hosts.model_sheet import EMBEDDINGS, HEAD, NORM, ModelSheet, Part, Weight
from ezpz_moe.tools.planning.cuts import Cut, expert_group
from ezpz_moe.tools.planning.load import distinct_ranks
from ezpz_moe.tools.planning.memory import numel, reshards, shard_numbers

GATHER, SCATTER, REDUCE = "all-gather", "reduce-scatter", "all-reduce"
ALL_TO_ALL, SEND = "all-to-all", "send"

FSDP, HSDP, EP, TP, PP = "FSDP", "replicas", "experts", "tensor parallel", "pipeline"

_SCORE, _ID = 4, 8
"""Bytes of a choice's score, in float32, and of its expert's number, in int64."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective that a rank takes part in.

    Attributes:
        purpose: whose it is, such as "FSDP".
        kind: which collective.
        size: ranks that take part.
        stride: distance between neighbours among them.
        sent: bytes of the whole tensor in each; of an all-to-all what a rank sends, to itself too.
        times: how many in one step.
    """

    purpose: str
    kind: str
    size: int
    stride: int
    sent: float
    times: float = 1

    @property
    def bytes_of_step(self) -> float:
        return self.sent * self.times


def traffic(
    sheet: ModelSheet, cut: Cut, parts: Counter[Part], stage: int = 0
) -> Iterator[Collective]:
    """Yield the collectives of a step for a rank of one pipeline stage, those of one rank left out.

    Args:
        sheet: the job's.
        cut: a legal one.
        parts: of the stage.
        stage: its number.
    """
    for part, times in parts.items():
        each = [*_of_fsdp(sheet, cut, part), *_of_experts(sheet, cut, part)]
        each += _of_tensor_parallel(sheet, cut, part)
        for collective in each:
            if collective.size > 1 and collective.sent:
                yield replace(collective, times=times * collective.times)
    if cut.pp > 1:
        # Activations to the next stage, and their gradients to the one before.
        neighbours = (stage > 0) + (stage < cut.pp - 1)
        yield Collective(
            PP,
            SEND,
            2,
            cut.ranks // cut.pp,
            _stream(sheet, cut) / _sequence_shards(sheet, cut),
            cut.microbatches * neighbours,
        )


def _of_fsdp(sheet: ModelSheet, cut: Cut, part: Part) -> Iterator[Collective]:
    """Weights gathered for forward and backward, gradients added up and scattered."""
    passes, gathered = _passes(sheet, cut, part)
    for is_expert in (False, True):
        size, stride = _fsdp_group(cut, is_expert)
        # Padded: every rank's shard is as large as the first one's.
        shard, learns = shard_numbers(sheet, cut.layout, part, is_expert)
        padded, learned = size * shard, size * learns
        yield Collective(FSDP, GATHER, size, stride, padded * sheet.job.compute_bytes, gathered)
        yield Collective(FSDP, SCATTER, size, stride, learned * sheet.job.reduce_bytes, passes)
        yield Collective(
            HSDP,
            REDUCE,
            cut.dp_replicate,
            cut.dp_shard * cut.tp,
            learned / size * sheet.job.reduce_bytes,
            passes,
        )


def _fsdp_group(cut: Cut, is_expert: bool) -> tuple[int, int]:
    """Return the size and the stride of the group over which FSDP shards."""
    if is_expert and cut.ep > 1:
        return expert_group(cut), cut.ep
    return cut.dp_shard, cut.tp


def _passes(sheet: ModelSheet, cut: Cut, part: Part) -> tuple[int, int]:
    """Return how often gradients are added up in a step, and how often weights are gathered."""
    is_head = part in (sheet.parts.get(NORM), sheet.parts.get(HEAD))
    if cut.pp == 1:
        # The head's group, with the norm, is not let go by forward. But a chunked loss has finished
        # the head's backward when the norm's begins, which gathers both once more.
        of_head = sheet.job.loss_chunks > 1 or sheet.job.reshards == "always"
        again = of_head if is_head else reshards(sheet, cut)
        return cut.microbatches, cut.microbatches * (1 + again)
    if is_head and sheet.job.loss_chunks > 1:
        # A chunked loss runs the head's backward by itself, which the pipeline does not hold back.
        return cut.microbatches, 2 * cut.microbatches + 1
    # A pipeline gathers once for all microbatches, and adds up once.
    return 1, 1 + reshards(sheet, cut)


def _of_experts(sheet: ModelSheet, cut: Cut, part: Part) -> Iterator[Collective]:
    """Rows to the experts and back, in forward and backward, and if forward is computed again."""
    routed = part.routed
    if routed is None or cut.ep == 1:
        return
    tokens = cut.microbatch * sheet.job.seq_len / cut.tp
    row = routed.row_width * sheet.job.compute_bytes
    # Selective checkpointing keeps what all-to-alls return.
    forwards = 2 if cut.checkpointing == "full" else 1
    each = (ALL_TO_ALL, cut.ep, 1)
    if not routed.is_one_node:
        rows = tokens * routed.top_k
        yield Collective(EP, *each, rows * row, cut.microbatches * 2 * (forwards + 1))
        return
    rows = tokens * distinct_ranks(routed.num_experts, routed.top_k, cut.ep)
    scores, ids = routed.top_k * _SCORE, routed.top_k * _ID
    # There: a token, its scores and its choices; back: a row. In backward: a row there, and
    # gradients of the token and of the scores back.
    yield Collective(EP, *each, rows * (row + scores + ids), cut.microbatches * forwards)
    yield Collective(EP, *each, rows * row, cut.microbatches * (forwards + 1))
    yield Collective(EP, *each, rows * (row + scores), cut.microbatches)


def _of_tensor_parallel(sheet: ModelSheet, cut: Cut, part: Part) -> Iterator[Collective]:
    """Activations around split products, gradients of what is not split, and the loss."""
    gathers, scatters = _around_products(sheet, cut, part)
    # Backward has the opposite of each. What checkpointing computes again it also gathers again,
    # and with "full" scatters again.
    again = (cut.checkpointing != "none") * _is_layer(part)
    gathered = gathers * (1 + again) + scatters
    scattered = scatters * (1 + again * (cut.checkpointing == "full")) + gathers
    of_tp = (cut.tp, 1)
    stream = _stream(sheet, cut)
    yield Collective(TP, GATHER, *of_tp, stream, cut.microbatches * gathered)
    yield Collective(TP, SCATTER, *of_tp, stream, cut.microbatches * scattered)
    whole = [numel(w.shape) for w in part.weights if w.learns and _is_whole(w) and w.shape]
    if whole:  # each by itself, of about the mean's size
        mean = sum(whole) / len(whole) * sheet.job.compute_bytes
        yield Collective(TP, REDUCE, *of_tp, mean, cut.microbatches * len(whole))
    if part == sheet.parts.get(HEAD):
        # Of every token the largest logit, the sum of exponentials, and the label's logit.
        chunks = sheet.job.loss_chunks
        figures = cut.microbatch * sheet.job.seq_len * _FIGURE / chunks
        yield Collective(TP, REDUCE, *of_tp, figures, cut.microbatches * 3 * chunks)


_FIGURE = 4
"""Bytes of a float32."""


def _is_whole(weight: Weight) -> bool:
    """Return whether every rank of a tensor-parallel group has all of a weight."""
    return weight.split is None and not weight.is_expert


def _is_layer(part: Part) -> bool:
    return bool(part.scores)


def _around_products(sheet: ModelSheet, cut: Cut, part: Part) -> tuple[int, int]:
    """Return how often forward gathers the residual stream of a part, and scatters it."""
    if part == sheet.parts.get(EMBEDDINGS):
        return 0, 1
    if part == sheet.parts.get(NORM):
        return 1, 0
    found = {weight.component for weight in part.weights}
    gathers = scatters = ("attention projections" in found) + ("dense FFN" in found)
    shared = "shared experts" in found
    if part.routed is None:
        return gathers, scatters
    if cut.ep > 1:  # experts take what the rank has of the sequence
        return gathers + shared, scatters + shared
    return gathers + 1, scatters + 1 + shared


def _stream(sheet: ModelSheet, cut: Cut) -> int:
    """Return the bytes of a microbatch's residual stream."""
    return cut.microbatch * sheet.job.seq_len * sheet.dim * sheet.job.compute_bytes


def _sequence_shards(sheet: ModelSheet, cut: Cut) -> int:
    return cut.tp if sheet.job.sequence_parallel else 1
