"""What the binding relies on in torchtitan's main branch: 0.3's lines, and what differs."""

from ezpz_moe.hosts.reliance import Reliance
from ezpz_moe.hosts.titan_0_3.relied_on import RELIED_ON as RELIED_ON_0_3
from ezpz_moe.hosts.titan_0_3.relied_on import STATE_DICT_KEYS

__all__ = ["RELIED_ON", "STATE_DICT_KEYS"]

_CHANGED: tuple[Reliance, ...] = (
    Reliance(
        "torchtitan.config.configs:TrainingConfig",
        used_for="a job's batches and lengths, in tokens",
        if_broken="a job cannot say how much is computed at once",
        fields=(
            "num_tokens_per_microbatch_per_dp_rank",
            "num_tokens_per_train_step",
            "max_context_length",
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.config.configs:ParallelismConfig",
        used_for="the microbatches of a pipeline",
        if_broken="a job with a pipeline cannot be trained",
        fields=("num_pp_microbatches",),
    ),
    Reliance(
        "torchtitan.models.common:ComplexRoPE.Config",
        used_for="positions of model sizes that upstream does not have; the length of a sequence",
        if_broken="flavors with sizes of their own, and _sdpa flavors, cannot be built",
        fields=("max_context_length",),
    ),
    Reliance(
        "torchtitan.components.data:SingleDatasetConfig",
        used_for="our own texts in the host's data pipeline",
        if_broken="only the host's own datasets can be used: no dataset_path, no embedded text",
        fields=("source", "processor", "post_filters"),
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
_GONE = {"torchtitan.hf_datasets:DatasetConfig", *(line.thing for line in _CHANGED)}

RELIED_ON: tuple[Reliance, ...] = (
    *(line for line in RELIED_ON_0_3 if line.thing not in _GONE),
    *_CHANGED,
)
