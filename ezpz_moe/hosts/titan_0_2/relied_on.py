"""What the binding relies on in torchtitan 0.2."""

from ezpz_moe.hosts.reliance import Reliance
from ezpz_moe.hosts.titan_0_3.relied_on import SAFETENSORS

_NOTHING_TRAINS = "nothing can be trained with this host"
_NO_BACKEND = "no backend but grouped_mm can be bound; training with the stock path still works"

RELIED_ON: tuple[Reliance, ...] = (
    Reliance(
        "torchtitan.config.manager:ConfigManager._merge_configs",
        used_for="job.custom_config_module: it merges ezpz_moe.JobConfig into the host's",
        if_broken='[job] custom_config_module = "ezpz_moe" has no effect',
        takes=("base", "custom"),
        vital=True,
    ),
    Reliance(
        "torchtitan.config:JobConfig",
        used_for="what a job becomes",
        if_broken=_NOTHING_TRAINS,
        fields=("job", "model", "training", "validation", "parallelism", "checkpoint"),
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.train_spec:register_train_spec",
        used_for='[model] name = "ezpz_moe"',
        if_broken=_NOTHING_TRAINS,
        takes=("name", "train_spec"),
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.train_spec:TrainSpec",
        used_for="flavors as models; its parallelize_fn is wrapped for FSDP over gloo",
        if_broken=_NOTHING_TRAINS,
        fields=("model_cls", "model_args", "parallelize_fn", "build_tokenizer_fn"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:GroupedExperts",
        used_for="the selector is a subclass of it, with the same parameters",
        if_broken=_NO_BACKEND,
        takes=("dim", "hidden_dim", "num_experts", "use_grouped_mm"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:GroupedExperts.forward",
        used_for="a backend computes the whole SwiGLU FFN in its place",
        if_broken=_NO_BACKEND,
        takes=("x", "num_tokens_per_expert"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe:MoE",
        used_for="holds the experts under their name in every state-dict key",
        if_broken=_NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:TokenChoiceTopKRouter.forward",
        used_for="on the CPU, a subclass counts tokens with torch.bincount",
        if_broken="training on a machine without an accelerator does not start",
    ),
    Reliance(
        "torchtitan.models.moe.moe:TokenReorderer.forward",
        used_for="the same",
        if_broken="training on a machine without an accelerator does not start",
    ),
    Reliance(
        "torchtitan.models.deepseek_v3:DeepSeekV3ModelArgs",
        used_for="model sizes that upstream does not have",
        if_broken="flavors with sizes of their own cannot be built; those with `base` still can",
        fields=("inter_dim", "moe_inter_dim", "moe_args", "attn_type", "mscale", "rope_factor"),
    ),
    Reliance(
        "torchtitan.models.moe:MoEArgs",
        used_for="the same",
        if_broken="flavors with sizes of their own cannot be built; those with `base` still can",
        fields=("num_expert_groups", "num_limited_groups", "score_before_experts"),
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:DATASETS",
        used_for="the embedded text and the user's own files",
        if_broken="only the host's own datasets can be used: no dataset_path, no embedded text",
    ),
    *SAFETENSORS,
    Reliance(
        "torchtitan.tools.utils:device_type",
        used_for="telling the host to train on the CPU where no accelerator is",
        if_broken="training on a machine without an accelerator does not start",
    ),
)

STATE_DICT_KEYS = (
    "layers.1.moe.experts.w1",
    "layers.1.moe.experts.w2",
    "layers.1.moe.experts.w3",
    "layers.1.moe.router.gate.weight",
    "layers.1.moe.expert_bias",
)
"""Some keys of a checkpoint of `debugmodel`: those of a layer with experts."""
