"""List what the binding relies on in torchtitan 0.2. "Vital" means the same as for 0.3."""

from ezpz_moe.hosts.reliance import NO_BACKEND, NO_FLAVOR, NOTHING_TRAINS, Reliance
from ezpz_moe.hosts.relied_on_by_all import DATASET_CONFIG, OF_EVERY_GENERATION

_NO_PREFLIGHT = "`ezpz-moe preflight` cannot build the ranks of a run"

RELIED_ON: tuple[Reliance, ...] = (
    Reliance(
        # Private, but it is the very call that the host makes for custom_config_module.
        "torchtitan.config.manager:ConfigManager._merge_configs",
        used_for="job.custom_config_module: it merges ezpz_moe.JobConfig into the host's",
        if_broken='[job] custom_config_module = "ezpz_moe" has no effect',
        takes=("base", "custom"),
        vital=True,
    ),
    Reliance(
        "torchtitan.config:JobConfig",
        used_for="the config that a job becomes",
        if_broken=NOTHING_TRAINS,
        fields=("job", "model", "training", "validation", "parallelism", "checkpoint"),
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.train_spec:register_train_spec",
        used_for='[model] name = "ezpz_moe"',
        if_broken=NOTHING_TRAINS,
        takes=("name", "train_spec"),
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.train_spec:TrainSpec",
        used_for="flavors as models; its parallelize_fn is wrapped for FSDP over gloo",
        if_broken=NOTHING_TRAINS,
        fields=(
            "model_cls",
            "model_args",
            "parallelize_fn",
            "build_tokenizer_fn",
            "build_metrics_processor_fn",
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:GroupedExperts",
        used_for="the selector is a subclass of it, with the same parameters",
        if_broken=NO_BACKEND,
        takes=("dim", "hidden_dim", "num_experts", "use_grouped_mm"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:GroupedExperts.forward",
        used_for="a backend computes the whole SwiGLU FFN in its place",
        if_broken=NO_BACKEND,
        takes=("x", "num_tokens_per_expert"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe:MoE",
        used_for="holds the experts under their name in every state-dict key",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:TokenChoiceTopKRouter.forward",
        used_for="on the CPU, a subclass counts tokens with torch.bincount",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe.moe:TokenReorderer.forward",
        used_for="the same",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.deepseek_v3:DeepSeekV3ModelArgs",
        used_for="model sizes that upstream does not have",
        if_broken=NO_FLAVOR,
        fields=("inter_dim", "moe_inter_dim", "moe_args", "attn_type", "mscale", "rope_factor"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.moe:MoEArgs",
        used_for="the same",
        if_broken=NO_FLAVOR,
        fields=("num_expert_groups", "num_limited_groups", "score_before_experts"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models:_supported_models",
        used_for="the names of the host's own models: a flavor's `base`",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.train_spec:get_train_spec",
        used_for="the model and the functions of the host that a flavor is built with",
        if_broken=NO_FLAVOR,
        takes=("name",),
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.model:ModelProtocol.init_weights",
        used_for="a flavor's model starts on several CPU ranks as on one",
        if_broken=NO_FLAVOR,
        takes=("buffer_device",),
        vital=True,
    ),
    Reliance(
        "torchtitan.protocols.model:BaseModelArgs",
        used_for="the arguments of any model of the host's",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.components.loss:build_cross_entropy_loss",
        used_for="the loss of every flavor",
        if_broken=NO_FLAVOR,
        takes=("job_config",),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.lr_scheduler:build_lr_schedulers",
        used_for="the learning rates of every flavor",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.components.tokenizer:build_hf_tokenizer",
        used_for="the tokenizer of every flavor",
        if_broken=NO_FLAVOR,
        takes=("job_config",),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.validate:Validator.validate",
        takes=("model_parts", "step"),
        used_for="the validation of every flavor",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:build_text_dataloader",
        used_for="the data of every flavor",
        if_broken=NO_FLAVOR,
        takes=("dp_world_size", "job_config"),
        vital=True,
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:build_text_validation_dataloader",
        used_for="counting the steps that each rank has of a validation text",
        if_broken=NO_FLAVOR,
        takes=("dp_world_size", "dp_rank", "tokenizer", "job_config"),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.validate:BaseValidator",
        used_for="the validation of every flavor",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    DATASET_CONFIG,
    Reliance(
        "torchtitan.components.metrics:build_metrics_processor",
        used_for="the metrics of every flavor",
        if_broken=NO_FLAVOR,
        takes=("job_config", "parallel_dims", "model_args"),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.metrics:MetricsProcessor",
        used_for="a subclass of it reports what a backend dropped",
        if_broken=NO_FLAVOR,
        has=("log",),
        sets=("model_parts",),
        vital=True,
    ),
    Reliance(
        "torchtitan.config:ConfigManager.parse_args",
        # Not vital, like the two after it: training does without preflight.
        used_for="preflight reads the host's flags with it",
        if_broken=_NO_PREFLIGHT,
        takes=("args",),
    ),
    Reliance(
        "torchtitan.distributed.utils:init_distributed",
        used_for="preflight checks whether it accepts an existing fake group",
        if_broken=_NO_PREFLIGHT,
    ),
    Reliance(
        "torchtitan.train:Trainer",
        used_for="preflight builds it",
        if_broken=_NO_PREFLIGHT,
    ),
    *OF_EVERY_GENERATION,
)

STATE_DICT_KEYS = (
    "layers.1.moe.experts.w1",
    "layers.1.moe.experts.w2",
    "layers.1.moe.experts.w3",
    "layers.1.moe.router.gate.weight",
    "layers.1.moe.expert_bias",
)
"""Sample keys of a checkpoint of `debugmodel`: those of a layer with experts."""
