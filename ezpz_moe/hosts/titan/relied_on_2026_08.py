"""List what the binding relies on in torchtitan of August 2026: 0.3's lines and the changes."""

from ezpz_moe.hosts.reliance import NO_FLAVOR, Reliance
from ezpz_moe.hosts.titan.relied_on import RELIED_ON as RELIED_ON_0_3
from ezpz_moe.hosts.titan.relied_on_in_part import CHATS

_CHANGED: tuple[Reliance, ...] = (
    Reliance(
        "torchtitan.config.configs:TrainingConfig",
        used_for="a job's batches and lengths, in tokens",
        if_broken="a job cannot say how much is computed at once",
        fields=(
            "num_tokens_per_microbatch_per_dp_rank",
            "num_tokens_per_train_step",
            "max_context_length",
            "disable_cuda_graphs",
            "steps",
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.config.configs:ParallelismConfig",
        used_for="where a job's [parallelism] goes, and what is checked before a run",
        if_broken=NO_FLAVOR,
        fields=(
            "context_parallel_degree",
            "data_parallel_replicate_degree",
            "data_parallel_shard_degree",
            "expert_parallel_degree",
            "num_pp_microbatches",
            "pipeline_parallel_degree",
            "pipeline_parallel_schedule",
            "spmd_backend",
            "tensor_parallel_degree",
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common:ComplexRoPE.Config",
        used_for="positions of model sizes that upstream does not have; the length of a sequence",
        if_broken=NO_FLAVOR,
        fields=("dim", "max_context_length", "theta", "scaling", "rope_factor", "original_seq_len"),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.data:SingleDatasetConfig",
        used_for="our own texts in the host's data pipeline",
        if_broken=NO_FLAVOR,
        fields=("source", "processor", "post_filters"),
        vital=True,
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:TextProcessor.Config",
        used_for="the same: their documents as tokens",
        if_broken=NO_FLAVOR,
        fields=("text_fn",),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.data:ConcatThenSplitPackingConfig",
        used_for="the same: packed into rows",
        if_broken=NO_FLAVOR,
        fields=("dataset",),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.data:DatasetIterationPolicy",
        used_for="the same: how many ranks share them",
        if_broken=NO_FLAVOR,
        fields=("dp_world_size",),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.data:GrainDataLoader.Config",
        used_for="the dataloader of a job",
        if_broken="a job has no data to train on",
        fields=("dataset", "repeat", "seed", "num_prefetch_batches"),
        vital=True,
    ),
)
# Includes the changed lines: two lines for one thing would ask for fields of both generations.
_GONE = {
    "torchtitan.hf_datasets:DatasetConfig",
    "torchtitan.hf_datasets.text_datasets:HuggingFaceTextDataLoader.Config",
    *(line.thing for line in CHATS),
    *(line.thing for line in _CHANGED),
}

RELIED_ON: tuple[Reliance, ...] = (
    *(line for line in RELIED_ON_0_3 if line.thing not in _GONE),
    *_CHANGED,
)
