"""torchtitan of August 2026, which folds batch and length into one dimension of tokens.

A job means the same work as on 0.3: ``local_batch_size`` sequences of ``seq_len`` tokens become a
microbatch of ``local_batch_size * seq_len`` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.reliance import Reliance
from ezpz_moe.hosts.titan.base import Sequences
from ezpz_moe.hosts.titan.v0_3 import Titan03

if TYPE_CHECKING:
    from ezpz_moe.config.keys import Keys

_PP_MICROBATCHES = "parallelism.num_pp_microbatches"

# 0.3's defaults. This host's own default of 16384 tokens is their product.
_BATCH, _LENGTH = 8, 2048


class Titan2026_08(Titan03):
    """torchtitan of August 2026."""

    generation = "2026_08"
    name = "torchtitan of August 2026"
    evidence = Reliance(
        "torchtitan.config.configs:TrainingConfig",
        used_for="recognizing the host's generation",
        if_broken="this is torchtitan 0.3 or older",
        # A field, because the class itself is in 0.3 too.
        fields=("max_context_length",),
        vital=True,
    )
    trains_on_chats = False  # titan/chats_2026_08.py

    @property
    def relied_on(self) -> tuple[Reliance, ...]:
        from ezpz_moe.hosts.titan.relied_on_2026_08 import RELIED_ON

        return RELIED_ON

    def job_keys(self) -> Keys:
        from ezpz_moe.hosts.titan.job_keys_2026_08 import KEYS

        return KEYS

    LENGTH = "training.max_context_length"
    LONGEST = "max_context_length"
    # Folded: the loss cuts all tokens of a microbatch, across sequences.
    CUT_BY_LOSS = "training.num_tokens_per_microbatch_per_dp_rank"
    STEP = "training.num_tokens_per_train_step"
    MICROBATCH = "training.num_tokens_per_microbatch_per_dp_rank"

    def microbatches(self, parallelism: Any) -> int:
        if parallelism.pipeline_parallel_degree == 1:
            return 1
        return parallelism.num_pp_microbatches

    def work(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields from 0.3's keys for how much is computed at once.

        Raises:
            EzpzError: a key is set together with the one that replaced it, or the pipeline cannot
                cut the batch into its microbatches.
        """
        from ezpz_moe.hosts.titan.job_keys_2026_08 import REPLACED

        for old, new in REPLACED.items():
            if old in values and new in values:
                raise EzpzError(f"{old} and {new} say the same thing. Remove one of them.")
        # Otherwise the new keys would be overwritten with products of 0.3's defaults.
        if not values.keys() & REPLACED.keys():
            return {}
        # One of the two names at most is set, as checked above; without either, 0.3's default.
        length = values.get("training.seq_len", values.get(self.LENGTH, _LENGTH))
        sequences = values.get("training.local_batch_size", _BATCH)
        fields = {self.LENGTH: length}
        if values.get("parallelism.pipeline_parallel_degree", 1) > 1:
            size = values.get("parallelism.pipeline_parallel_microbatch_size", 1)
            if sequences % size:
                raise EzpzError(
                    f"training.local_batch_size = {sequences} is not a multiple of "
                    f"parallelism.pipeline_parallel_microbatch_size = {size}."
                )
            # With a pipeline, this host's token count is that of one pipeline microbatch.
            fields[_PP_MICROBATCHES] = sequences // size
            sequences = size
        fields[self.MICROBATCH] = sequences * length
        # -1 counts nothing, so there is nothing to convert.
        if (whole := values.get("training.global_batch_size", -1)) != -1:
            fields[self.STEP] = whole * length
        return fields

    def one_sequence(self, length: int) -> tuple[int, ...]:
        return (length,)  # tokens alone: [T]

    def sequences(self, training: Any, parallelism: Any, data_ranks: int) -> Sequences:
        tokens = training.num_tokens_per_microbatch_per_dp_rank
        # A microbatch may have fewer tokens than the longest sequence that is allowed.
        length = min(training.max_context_length, tokens)
        whole = training.num_tokens_per_train_step
        if whole < 0:
            whole = tokens * data_ranks * self.microbatches(parallelism)
        return Sequences(of_step=whole // length, of_microbatch=tokens // length, length=length)

    def fit_model(self, config: Any) -> None:
        """Tell causal attention where a sequence ends: the host's tensors no longer show it."""
        for attention in _causal_attentions(self, config):
            attention.context_length = _sequence(config)

    def own_conflicts(self, config: Any) -> Iterator[str]:
        """Refuse microbatches that are not whole sequences: SDPA attends within whole ones."""
        tokens, length = config.training.num_tokens_per_microbatch_per_dp_rank, _sequence(config)
        # FlexAttention needs no whole sequences: its mask comes from the positions.
        if tokens % length and any(True for _ in _causal_attentions(self, config)):
            yield (
                f"{self.MICROBATCH} = {tokens} is not a multiple of {self.LENGTH} = {length}, but "
                "SDPA attends within whole sequences. Choose a multiple, or a flavor without _sdpa."
            )

    def causal_attention(self, config: Any) -> Any:
        with self.importing():
            from ezpz_moe.hosts.titan.attention_2026_08 import causal_attention
        return causal_attention(config)

    def validation_batches(self, validator: Any) -> tuple[dict[str, Any], int]:
        batch = {
            "max_context_length": validator.seq_len,
            "num_tokens_per_batch": validator.num_tokens_per_batch,
        }
        has_pipeline = validator.parallel_dims.pp_enabled
        return batch, validator.parallelism.num_pp_microbatches if has_pipeline else 1

    def dataloader_config(
        self,
        dataset: str | None,
        dataset_path: str | None,
        *,
        job_folder: Path | None,
        infinite: bool = True,
    ) -> Any:
        with self.importing():
            from ezpz_moe.hosts.titan.data_2026_08 import dataloader_config
        return dataloader_config(dataset, dataset_path, job_folder=job_folder, infinite=infinite)


def _sequence(config: Any) -> int:
    """Return the number of tokens of a sequence in a microbatch."""
    training = config.training
    return min(training.max_context_length, training.num_tokens_per_microbatch_per_dp_rank)


def _causal_attentions(host: Titan2026_08, config: Any) -> Iterator[Any]:
    """Yield the configs of :class:`CausalAttention` in a run's model."""
    with host.importing():
        from ezpz_moe.hosts.titan.attention_2026_08 import CausalAttention
    if config.model_spec is not None:
        for _, node, _, _ in config.model_spec.model.traverse(CausalAttention.Config):
            yield node
