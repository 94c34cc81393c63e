"""What the binding relies on in torchtitan 0.3."""

from ezpz_moe.hosts.reliance import Reliance

_NOTHING_TRAINS = "nothing can be trained with this host"
NO_BACKEND = "no backend but grouped_mm can be bound; training with the stock path still works"
_NO_SIZES = "flavors with sizes of their own cannot be built; those with `base` still can"
_NO_TEXTS = "only the host's own datasets can be used: no dataset_path, no embedded text"
_SETTINGS_MOVED = "a job that sets what was renamed is refused; flavors without a job still train"
_NO_SAFETENSORS = "`ckpt remap` cannot go through the host's adapter to or from safetensors"
_DOOR_1 = "--module ezpz_moe --config ... cannot be used; --override.imports may still work"
_DOOR_2 = "--override.imports ezpz_moe.overrides.... cannot be used; --module ezpz_moe still works"

SAFETENSORS = (
    Reliance(
        "torchtitan.protocols.state_dict_adapter:StateDictAdapter.to_hf",
        used_for="ckpt remap --to hf",
        if_broken=_NO_SAFETENSORS,
        takes=("state_dict",),
    ),
    Reliance(
        "torchtitan.protocols.state_dict_adapter:StateDictAdapter.from_hf",
        used_for="ckpt remap of safetensors",
        if_broken=_NO_SAFETENSORS,
        takes=("hf_state_dict",),
    ),
)
"""Of every generation."""

RELIED_ON: tuple[Reliance, ...] = (
    Reliance(
        "torch.distributed:set_timeout",
        used_for="the host calls it after the first step (torch older than 2.14 lacks it)",
        if_broken=_NOTHING_TRAINS,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:GroupedExperts.Config",
        used_for="the selector's own Config is a subclass of it",
        if_broken=NO_BACKEND,
        fields=("dim", "hidden_dim", "num_experts"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:GroupedExperts._grouped_mm",
        used_for="the seam that a backend replaces in experts other than SwiGLU (gpt_oss)",
        if_broken="the seam moved: " + NO_BACKEND,
        takes=("A", "B_t", "offs"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:GroupedExperts.forward",
        used_for="a backend computes the whole SwiGLU FFN in its place",
        if_broken=NO_BACKEND,
        takes=("x_RD", "num_tokens_per_expert_E"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.moe:RoutedExperts",
        used_for="holds the experts under its own name in every state-dict key",
        if_broken="checkpoints of this host have other keys",
        vital=True,
    ),
    Reliance(
        "torchtitan.config.override:override",
        used_for="door 2",
        if_broken=_DOOR_2,
        takes=("target", "description"),
    ),
    Reliance(
        "torchtitan.config.configurable:Configurable.Config.traverse",
        used_for="finding every routed-experts and attention node of a model",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.config:ConfigManager.parse_args",
        used_for="door 1: it asks ezpz_moe.config_registry for the name after --config",
        if_broken=_DOOR_1,
        takes=("args",),
    ),
    Reliance(
        "torchtitan.trainer:Trainer.Config",
        used_for="what a job becomes",
        if_broken=_NOTHING_TRAINS,
        fields=("model_spec", "training", "parallelism", "checkpoint", "override", "loss"),
        vital=True,
    ),
    Reliance(
        "torchtitan.config.configs:TrainingConfig",
        used_for="where a job's [training] goes",
        if_broken=_SETTINGS_MOVED,
        fields=("local_batch_size", "global_batch_size", "seq_len", "steps", "disable_cuda_graphs"),
    ),
    Reliance(
        "torchtitan.config.configs:ParallelismConfig",
        used_for="where a job's [parallelism] goes",
        if_broken=_SETTINGS_MOVED,
        fields=(
            "data_parallel_shard_degree",
            "expert_parallel_degree",
            "pipeline_parallel_degree",
            "pipeline_parallel_microbatch_size",
            "spmd_backend",
            "tensor_parallel_degree",
        ),
    ),
    Reliance(
        "torchtitan.protocols.model_spec:ModelSpec",
        used_for="a flavor's model; its parallelize_fn is wrapped for FSDP over gloo",
        if_broken=_NOTHING_TRAINS,
        fields=("name", "flavor", "model", "parallelize_fn"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.deepseek_v3:_build_dsv3_layers",
        used_for="model sizes that upstream does not have, with upstream's initial values",
        if_broken=_NO_SIZES,
    ),
    Reliance(
        "torchtitan.models.deepseek_v3:build_mla_moe_layers",
        used_for="the same: it takes the dimensions of a flavor",
        if_broken=_NO_SIZES,
        takes=("moe_hidden_dim", "num_experts", "router_top_k", "rope", "attn_backend"),
    ),
    Reliance(
        "torchtitan.models.common.attention:ScaledDotProductAttention",
        used_for='attention = "sdpa", where FlexAttention has no backward',
        if_broken="_sdpa flavors cannot be built; flex and varlen still can",
        takes=("config",),
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:DATASETS",
        used_for="the embedded text and the user's own files",
        if_broken=_NO_TEXTS,
    ),
    Reliance(
        "torchtitan.hf_datasets:DatasetConfig",
        used_for="the same: an entry of it",
        if_broken=_NO_TEXTS,
        fields=("path", "loader", "sample_processor"),
    ),
    *SAFETENSORS,
    Reliance(
        "torchtitan.tools.utils:device_type",
        used_for="telling the host to train on the CPU where no accelerator is",
        if_broken="training on a machine without an accelerator does not start",
    ),
)

STATE_DICT_KEYS = (
    "layers.1.moe.routed_experts.inner_experts.w1_EFD",
    "layers.1.moe.routed_experts.inner_experts.w2_EDF",
    "layers.1.moe.routed_experts.inner_experts.w3_EFD",
    "layers.1.moe.router.gate.weight",
    "layers.1.moe.expert_bias_E",
)
"""Some keys of a checkpoint of `debugmodel`: those of a layer with experts."""
