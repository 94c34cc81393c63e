"""What planning has to know of a job's model: every weight, and how the host splits it.

Numbers only, no torch: a cut's memory, traffic and time are arithmetic on this
(:mod:`ezpz_moe.tools.planning`).

Legend: E = routed experts, K = experts per token, D = model dimension, L = tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

EMBEDDINGS, NORM, HEAD = "tok_embeddings", "norm", "lm_head"
"""The parts of a model that are no layer; those are called "layers.0" and so on."""


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        component: as in :data:`ezpz_moe.hosts.accounting.COMPONENTS`.
        shape: of the whole; empty if another part counts it already.
        split: the dimension that tensor parallelism splits; None: every rank has all of it. Of a
            routed expert it counts without expert parallelism, which splits the first dimension.
        used: how often a token multiplies by it, on average: 1 for a linear layer, K / E for
            routed experts, 0 where there is no product.
        is_expert: whether it belongs to routed experts.
        learns: whether it has a gradient and optimizer states.
    """

    component: str
    shape: tuple[int, ...]
    split: int | None
    used: float
    is_expert: bool
    learns: bool = True

    @property
    def forward(self) -> float:
        """Forward FLOPs per token: 2 per multiply-add."""
        return 2 * self.used * prod(self.shape)


@dataclass(frozen=True)
class Routed:
    """The routed experts of one layer.

    Attributes:
        num_experts: E.
        top_k: K.
        row_width: numbers in a row that ranks exchange: D, or the width of a latent.
        is_one_node: whether a token goes once to each rank that has experts of its; else a row goes
            for each of its K choices.
    """

    num_experts: int
    top_k: int
    row_width: int
    is_one_node: bool


# Compared as objects: thousands of cuts are looked up by these.
@dataclass(frozen=True, eq=False)
class Part:
    """A layer, or one of the parts around the layers. Layers that are alike are one object.

    Attributes:
        weights: in the model's order.
        scores: forward FLOPs per token of queries with keys, and the sum of values.
        routed: its routed experts, if it has any.
        held_scores: scores per token that attention holds in memory; 0 with a fused kernel.
    """

    weights: tuple[Weight, ...]
    scores: float = 0.0
    routed: Routed | None = None
    held_scores: int = 0

    @property
    def forward(self) -> float:
        """Forward FLOPs per token."""
        return sum(weight.forward for weight in self.weights) + self.scores


@dataclass(frozen=True)
class Degrees:
    """How a job says its ranks share model and batch; a ``dp_shard`` of -1 takes what is left."""

    dp_shard: int
    dp_replicate: int
    tp: int
    pp: int
    ep: int


@dataclass(frozen=True)
class JobSheet:
    """What a job does in a step, as far as a plan depends on it.

    Attributes:
        degrees: the job's own.
        seq_len: L.
        local_batch: sequences of a rank in one pass: a microbatch, or all of a pipeline's.
        global_batch: sequences of a step; -1: one pass of every rank.
        microbatch: sequences that a pipeline computes at once.
        checkpointing: "none", "selective" or "full".
        schedule: of the pipeline, in torch's words.
        less_layers: layers that embeddings, and norm and head, count as in a pipeline.
        reshards: ``fsdp_reshard_after_forward``.
        weight_bytes: of a number in weights, gradients and optimizer states.
        compute_bytes: of a number in products, and in what ranks exchange of it.
        reduce_bytes: of a number in gradients that ranks add up.
        sequence_parallel: whether tensor parallelism splits the sequence between products.
        spmd: the host's ``parallelism.spmd_backend``.
        loss_chunks: pieces in which the loss applies the output head itself; 1: the model does.
    """

    degrees: Degrees
    seq_len: int
    local_batch: int
    global_batch: int
    microbatch: int
    checkpointing: str
    schedule: str
    less_layers: tuple[int, int]
    reshards: str
    weight_bytes: int
    compute_bytes: int
    reduce_bytes: int
    sequence_parallel: bool
    spmd: str
    loss_chunks: int


@dataclass(frozen=True, eq=False)
class ModelSheet:
    """A model as planning sees it.

    Attributes:
        flavor: its name.
        dim: D.
        n_layers: all of them.
        parts: by name, in the model's order.
        heads: numbers of attention heads, of queries and of keys, that tensor parallelism splits.
        backend: what computes the experts; empty for a dense model.
        pads: whether that pads every expert's rows to those of the busiest one.
        is_tied: whether embeddings and head share a matrix.
        job: what is done with it.
    """

    flavor: str
    dim: int
    n_layers: int
    parts: Mapping[str, Part]
    heads: tuple[int, ...]
    backend: str
    pads: bool
    is_tied: bool
    job: JobSheet

    @property
    def forward(self) -> float:
        """Forward FLOPs per token of the whole model."""
        return sum(part.forward for part in self.parts.values())

    @property
    def routed(self) -> tuple[Routed, ...]:
        """The routed experts of all layers that have some."""
        return tuple(part.routed for part in self.parts.values() if part.routed)
