"""How torchtitan 0.3 says what its main branch says otherwise: batches of sequences.

``titan_main/dialect.py`` is the same file for main; compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ezpz_moe.hosts.ranks import Sequences

LENGTH = "training.seq_len"
"""Where the config says how many tokens a token may look back over."""

LONGEST = "max_seq_len"
"""The name of that limit on the model's side: of a decoder, and of its RoPE."""

CUT_BY_LOSS = "training.seq_len"
"""What the chunked loss cuts into equal parts."""

STEP = "training.global_batch_size"
"""What all ranks compute between two steps of the optimizer; -1: as little as possible."""

MICROBATCH = "training.local_batch_size"
"""What one rank computes at once, in the unit of ``STEP``."""


def microbatches(parallelism: Any) -> int:
    """How many ``MICROBATCH`` a rank computes at least: a pipeline divides its one further."""
    return 1


def work(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for the job's keys that are no field of the host: here all are."""
    return {}


def one_sequence(length: int) -> tuple[int, ...]:
    """The shape of a sequence of tokens, as a batch of one: [B, L]."""
    return (1, length)


def sequences(training: Any, parallelism: Any, data_ranks: int) -> Sequences:
    """How the work of a training step is cut; ``data_ranks`` have data of their own."""
    whole, batch = training.global_batch_size, training.local_batch_size
    piped = parallelism.pipeline_parallel_degree > 1
    return Sequences(
        of_step=batch * data_ranks if whole < 0 else whole,
        of_microbatch=parallelism.pipeline_parallel_microbatch_size if piped else batch,
        length=training.seq_len,
    )


def fit_model(config: Any) -> None:
    """Tell the model what only the whole config says: here nothing."""


CHECKS: tuple[Callable[[Any], Iterator[str]], ...] = ()
"""Conflicts that only this host has."""
