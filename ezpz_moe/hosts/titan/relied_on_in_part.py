"""List what only some flavors and commands rely on in torchtitan 0.3."""

from ezpz_moe.hosts.reliance import NO_FLAVOR, Reliance

_NOT_DESCRIBED = "`ezpz-moe describe` cannot tell a model's components"
NO_ROUTER = "flavors with [router], [balance] or [telemetry] cannot be trained; others still can"
_NO_TELEMETRY = "flavors with [telemetry] or with schedules cannot be trained; others still can"
_NO_PICTURES = "a flavor with [telemetry] must set images = false if loggers are enabled"
_NO_ZERO_COMPUTATION = "zero-computation experts and dispatch_padding = false cannot be used"

# Attributes of instances (`sets`): the classes themselves do not show them.
PICTURES = (
    Reliance(
        "torchtitan.components.metrics:LoggerContainer",
        used_for="finding the loggers that accept pictures of the load",
        if_broken=_NO_PICTURES,
        sets=("_loggers",),
    ),
    Reliance(
        "torchtitan.components.metrics:WandBLogger",
        used_for="pictures of the load for Weights & Biases",
        if_broken=_NO_PICTURES,
        sets=("wandb", "tag"),
    ),
    Reliance(
        "torchtitan.components.metrics:TensorBoardLogger",
        used_for="pictures of the load for TensorBoard",
        if_broken=_NO_PICTURES,
        sets=("writer", "tag"),
    ),
)
"""Needed by flavors with ``[telemetry]`` that draw pictures for the loggers."""

_NO_LATENT = "flavors with moe_latent_dim cannot be trained; others still can"
_NO_OTHER_FFNS = "flavors with ffn_activation or shared_gate cannot be trained; others still can"
_FFNS = (
    Reliance(
        "torchtitan.models.common.feed_forward:FeedForward.Config",
        used_for="an FFN with another activation is a subclass of it",
        if_broken=_NO_OTHER_FFNS,
        fields=("w1", "w2", "w3"),
    ),
    Reliance(
        "torchtitan.models.common.feed_forward:SigmoidGatedFeedForward.Config",
        used_for="shared experts with a gate are a subclass of it",
        if_broken=_NO_OTHER_FFNS,
        fields=("gate",),
    ),
    Reliance(
        "torchtitan.models.common.decoder_sharding:dense_activation_placement",
        used_for="how ranks of a tensor-parallel group hold what that gate computes",
        if_broken=_NO_OTHER_FFNS,
        takes=("tp",),
    ),
    Reliance(
        "torchtitan.protocols.module:Module",
        used_for="what the host wraps of a routed layer is between the matrices of a latent",
        if_broken=_NO_LATENT,
        has=("parallelize", "_cache_pos_arg_names", "_sharding_config"),
    ),
)
"""Needed by flavors whose FFNs are not the host's, or whose experts are in a latent."""

_NO_OVERLAP = "flavors with overlap_shared_experts cannot be trained; others still can"
_OVERLAP = (
    Reliance(
        "torchtitan.models.common.moe:MoE.forward",
        used_for="a layer that starts its shared experts before it calls this, which awaits them",
        if_broken=_NO_OVERLAP,
    ),
    Reliance(
        "torchtitan.models.common.feed_forward:FeedForward.forward",
        used_for="the same: what is called there",
        if_broken=_NO_OVERLAP,
        takes=("x",),
    ),
)
"""Needed by flavors whose shared experts are on a stream of their own."""

ROUTERS = (
    *_FFNS,
    *_OVERLAP,
    Reliance(
        "torchtitan.models.common.moe:TokenChoiceTopKRouter",
        used_for="a flavor's router is a subclass of it",
        if_broken=NO_ROUTER,
        # The second to last limits groups: ours replaces it, with other scores of a group.
        has=(
            "Config",
            "forward",
            "_get_node_limited_routing_scores",
            "_debug_force_load_balance_routing",
        ),
    ),
    Reliance(
        "torchtitan.models.common.moe:TokenChoiceTopKRouter.Config",
        used_for="the model's own routing, also for `ezpz-moe upcycle`",
        if_broken=f"{NO_ROUTER}; `ezpz-moe upcycle` cannot keep the dense model's function",
        fields=(
            "num_experts",
            "gate",
            "top_k",
            "score_func",
            "num_expert_groups",
            "num_limited_groups",
            "route_norm",
            "route_scale",
        ),
    ),
    Reliance(
        "torchtitan.models.common.linear:Linear.Config",
        used_for="a flavor's gate is a subclass of the host's linear layer",
        if_broken=NO_ROUTER,
        fields=("in_features", "out_features", "bias"),
    ),
    Reliance(
        "torchtitan.models.common.moe:MoE._init_self_buffers",
        used_for="counters and biases of zero-computation experts",
        if_broken=_NO_ZERO_COMPUTATION,
    ),
    Reliance(
        "torchtitan.models.common.token_dispatcher:LocalTokenDispatcher._local_reorder",
        used_for="sorts assignments that are not computed to the end, where they are cut off",
        if_broken=_NO_ZERO_COMPUTATION,
        takes=("x_TD", "topk_scores_TK", "topk_expert_ids_TK"),
    ),
    Reliance(
        "torchtitan.models.common.decoder_sharding:dense_param_placement",
        used_for="how ranks hold the constant experts' parameters",
        if_broken=_NO_ZERO_COMPUTATION,
        takes=("tp",),
    ),
    Reliance(
        "torchtitan.protocols.sharding:ShardingConfig",
        used_for="how ranks hold the constant experts' parameters",
        if_broken=_NO_ZERO_COMPUTATION,
        fields=("state_shardings",),
    ),
    Reliance(
        "torchtitan.components.loss:IGNORE_INDEX",
        used_for='which labels count, for [router] padding = "labels"',
        if_broken='[router] padding = "labels" cannot be used',
    ),
    Reliance(
        # Private, like torch's own way to recognize a recomputation.
        "torch._C:_current_graph_task_id",
        used_for="recognizing a recomputation, which the routers' counters skip",
        if_broken=NO_ROUTER,
    ),
    Reliance(
        "torchtitan.components.optimizer:register_moe_load_balancing_hook",
        # Ours takes its place in the spec, with these parameters, and never calls it.
        used_for="a hook of ours replaces it, to update the bias in other ways",
        if_broken="balance.bias_update may have no effect",
        takes=("optimizers", "model_parts", "parallel_dims"),
    ),
    Reliance(
        "torchtitan.distributed.activation_checkpoint:FullAC._wrap_block",
        used_for="full activation checkpointing that keeps the router's choices",
        if_broken=NO_ROUTER,
        takes=("module", "base_fqn"),
    ),
    Reliance(
        "torchtitan.components.metrics:MetricsProcessor",
        used_for="a flavor's telemetry is a subclass of it, as is what hides a CPU's MFU; it is "
        "asked before every step",
        if_broken=f"{_NO_TELEMETRY}; a CPU's MFU, which means nothing, is shown",
        has=("Config", "should_log", "log", "log_validation"),
        sets=("logger", "parallel_dims", "model_parts", "has_quantization"),
    ),
    Reliance(
        "torchtitan.components.metrics:_get_metrics_rank",
        used_for="telemetry.jsonl is written by the rank that the host logs on",
        if_broken=_NO_TELEMETRY,
        takes=("parallel_dims", "pp_schedule"),
    ),
    *PICTURES,
)
"""Needed by flavors with ``[router]``, ``[balance]`` or ``[telemetry]``."""

ANALYSIS = (
    Reliance(
        "torchtitan.models.common.moe:MoE",
        used_for="finding the layers with experts, their routers and their parameters' names",
        if_broken="`ezpz-moe analyze` and `upcycle` find no layers",
    ),
    Reliance(
        "torchtitan.components.tokenizer:HuggingFaceTokenizer",
        used_for="the text of `ezpz-moe analyze` and `generate` as tokens, and tokens as text",
        if_broken="`ezpz-moe analyze` cannot read a text, and `generate` cannot continue one",
        has=("encode", "decode", "apply_chat_template"),
        sets=("eos_id", "tokenizer"),
    ),
)

_NO_CHATS = "a job cannot train on chats; on text it still can"

CHATS = (
    Reliance(
        "torchtitan.components.dataloader:ParallelAwareDataloader",
        used_for='the dataloader of a job with dataset = "chat_file"',
        if_broken=_NO_CHATS,
        takes=("dataset", "dp_rank", "dp_world_size"),
    ),
    Reliance(
        "torchtitan.components.dataloader:ParallelAwareDataloader.Config",
        used_for="the same: how it fetches",
        if_broken=_NO_CHATS,
        fields=(
            *("dataset_path", "num_workers", "persistent_workers"),
            *("pin_memory", "prefetch_factor"),
        ),
    ),
    Reliance(
        "torchtitan.hf_datasets.text_datasets:ChatDataset",
        used_for="the same: its chats, packed into sequences",
        if_broken=_NO_CHATS,
        takes=("dataset", "tokenizer", "sample_processor", "seq_len", "dp_rank", "infinite"),
    ),
)
"""Needed by jobs whose data are chats."""

COMPONENTS = (
    Reliance(
        "torchtitan.models.common.feed_forward:FeedForward",
        used_for="telling a dense FFN from other components",
        if_broken=_NOT_DESCRIBED,
        vital=True,
    ),
    Reliance(
        "torchtitan.components.loss:ChunkedLossWrapper",
        used_for="telling whether the loss is computed in chunks",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
)

_NO_CHANGE = "flavors with [change] or [init] cannot be trained; others still can"

CHANGES = (
    Reliance(
        "torchtitan.protocols.module:Module.Config",
        used_for="initial values of a changed model, and those of [init]",
        if_broken=_NO_CHANGE,
        fields=("param_init",),
    ),
    Reliance(
        "torchtitan.models.common.param_init:depth_scaled_std",
        used_for="the same: how they shrink with a layer's number",
        if_broken=_NO_CHANGE,
        takes=("base_std", "layer_id"),
    ),
    Reliance(
        "torchtitan.models.common.decoder:TransformerBlock.Config",
        used_for="a layer's parts, which [change] sizes and a dense baseline replaces",
        if_broken=f"{_NO_CHANGE}; nor can dense baselines",
        fields=("attention", "attention_norm", "ffn_norm", "feed_forward", "moe"),
    ),
    Reliance(
        "torchtitan.models.common.config_utils:make_ffn_config",
        used_for="the FFN of a dense baseline",
        if_broken="flavors with dense_baseline_of cannot be trained; others still can",
        takes=("dim", "hidden_dim", "w1_param_init", "w2w3_param_init"),
    ),
)
"""Needed by flavors that change a model of the host's, its initial values, or its experts."""
