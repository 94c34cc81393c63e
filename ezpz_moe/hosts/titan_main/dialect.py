"""How torchtitan's main branch says what 0.3 says otherwise: tokens, with batch and length folded.

A job means the same work on both: ``local_batch_size`` sequences of ``seq_len`` tokens are a
microbatch of ``local_batch_size * seq_len`` tokens. ``titan_0_3/dialect.py`` is the same file for
0.3; compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.ranks import Sequences
from ezpz_moe.hosts.titan_main.attention import CausalAttention
from ezpz_moe.hosts.titan_main.job_keys import REPLACED

LENGTH = "training.max_context_length"
LONGEST = "max_context_length"
CUT_BY_LOSS = "training.num_tokens_per_microbatch_per_dp_rank"
STEP = "training.num_tokens_per_train_step"
MICROBATCH = "training.num_tokens_per_microbatch_per_dp_rank"

_PP_MICROBATCHES = "parallelism.num_pp_microbatches"

# 0.3's defaults; main's own default, 16384 tokens, is their product.
_BATCH, _LENGTH = 8, 2048


def microbatches(parallelism: Any) -> int:
    """How many ``MICROBATCH`` a rank computes at least: as many as its pipeline takes."""
    if parallelism.pipeline_parallel_degree == 1:
        return 1
    return parallelism.num_pp_microbatches


def work(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for 0.3's keys that say how much is computed at once.

    Raises:
        EzpzError: a key stands beside the one that replaced it, or the pipeline cannot cut the
            batch into its microbatches.
    """
    for old, new in REPLACED.items():
        if old in values and new in values:
            raise EzpzError(f"{old} and {new} say the same thing. Remove one of them.")
    if not values.keys() & REPLACED.keys():
        return {}
    length = values.get("training.seq_len", values.get(LENGTH, _LENGTH))
    sequences = values.get("training.local_batch_size", _BATCH)
    fields = {LENGTH: length}
    if values.get("parallelism.pipeline_parallel_degree", 1) > 1:
        size = values.get("parallelism.pipeline_parallel_microbatch_size", 1)
        if sequences % size:
            raise EzpzError(
                f"training.local_batch_size = {sequences} is not a multiple of "
                f"parallelism.pipeline_parallel_microbatch_size = {size}."
            )
        fields[_PP_MICROBATCHES] = sequences // size
        sequences = size
    fields[MICROBATCH] = sequences * length
    if (whole := values.get("training.global_batch_size", -1)) != -1:
        fields[STEP] = whole * length
    return fields


def one_sequence(length: int) -> tuple[int, ...]:
    """The shape of a sequence of tokens, as a tokens alone: [T]."""
    return (length,)


def sequences(training: Any, parallelism: Any, data_ranks: int) -> Sequences:
    """How the work of a training step is cut; ``data_ranks`` have data of their own."""
    tokens = training.num_tokens_per_microbatch_per_dp_rank
    length = min(training.max_context_length, tokens)
    whole = training.num_tokens_per_train_step
    if whole < 0:
        whole = tokens * data_ranks * microbatches(parallelism)
    return Sequences(of_step=whole // length, of_microbatch=tokens // length, length=length)


def fit_model(config: Any) -> None:
    """Tell causal attention where a sequence ends: the host's tensors no longer do."""
    for attention in _causal_attentions(config):
        attention.context_length = _sequence(config)


def _whole_sequences(config: Any) -> Iterator[str]:
    tokens, length = config.training.num_tokens_per_microbatch_per_dp_rank, _sequence(config)
    if tokens % length and any(True for _ in _causal_attentions(config)):
        yield (
            f"{MICROBATCH} = {tokens} is not a multiple of {LENGTH} = {length}, but SDPA attends "
            f"within whole sequences. Choose a multiple, or a flavor without _sdpa."
        )


CHECKS: tuple[Callable[[Any], Iterator[str]], ...] = (_whole_sequences,)


def _sequence(config: Any) -> int:
    training = config.training
    return min(training.max_context_length, training.num_tokens_per_microbatch_per_dp_rank)


def _causal_attentions(config: Any) -> Iterator[CausalAttention.Config]:
    if config.model_spec is not None:
        for _, node, _, _ in config.model_spec.model.traverse(CausalAttention.Config):
            yield node
