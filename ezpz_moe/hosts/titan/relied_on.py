"""List what the binding relies on in torchtitan 0.3.

A line is vital if every run needs it. That includes each name that the modules behind ``job.py``
import.
"""

from ezpz_moe.hosts.reliance import NO_BACKEND, NO_FLAVOR, NO_SIZES, NOTHING_TRAINS, Reliance
from ezpz_moe.hosts.relied_on_by_all import DATASET_CONFIG, OF_EVERY_GENERATION
from ezpz_moe.hosts.titan.relied_on_for_experts import EXPERTS
from ezpz_moe.hosts.titan.relied_on_in_part import (
    ANALYSIS,
    CHANGES,
    CHATS,
    COMPONENTS,
    ROUTERS,
)

_DOOR_1 = "--module ezpz_moe --config ... cannot be used; --override.imports may still work"
_DOOR_2 = "--override.imports ezpz_moe.overrides.... cannot be used; --module ezpz_moe still works"

_DOORS = (
    Reliance(
        "torchtitan.config.override:override",
        # Not vital, because door 1 does without.
        used_for="door 2",
        if_broken=_DOOR_2,
        takes=("target", "description"),
    ),
    Reliance(
        "torchtitan.config.override:apply_overrides",
        used_for="door 2 finds the run that it is in by the name of this parameter",
        if_broken="door 2 works without its checks, and without the lock of the run's folder",
        takes=("config_root",),
    ),
    Reliance(
        # Private: no public way leads from an override's name to what it replaces.
        "torchtitan.config.override:_REGISTRY",
        used_for="telling which overrides of a run exclude each other",
        if_broken="such overrides end in torchtitan's own traceback",
    ),
    Reliance(
        "torchtitan.config.override:derive",
        used_for="turning the experts' config into ours, with every field copied",
        if_broken=NO_BACKEND,
        takes=("source", "target_cls"),
        vital=True,
    ),
    Reliance(
        "torchtitan.config:Configurable.Config.traverse",
        used_for="finding every routed-experts and attention node of a model",
        if_broken=NO_BACKEND,
        vital=True,
    ),
    Reliance(
        "torchtitan.config:ConfigManager.parse_args",
        # Not vital, because door 2 does without.
        used_for="door 1: it asks ezpz_moe.config_registry for the name after --config",
        if_broken=_DOOR_1,
        takes=("args",),
    ),
)

_JOB = (
    Reliance(
        "torchtitan.trainer:Trainer.Config",
        used_for="the config that a job becomes",
        if_broken=NOTHING_TRAINS,
        fields=(
            *("model_spec", "training", "parallelism", "checkpoint", "override", "loss"),
            *("hf_assets_path", "optimizer", "dataloader", "validator", "activation_checkpoint"),
            *("comm", "profiler"),
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.config.configs:TrainingConfig",
        used_for="where a job's [training] goes, and what is checked before a run",
        if_broken=NO_FLAVOR,
        fields=("local_batch_size", "global_batch_size", "seq_len", "steps", "disable_cuda_graphs"),
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
            "pipeline_parallel_degree",
            "pipeline_parallel_microbatch_size",
            "pipeline_parallel_schedule",
            "spmd_backend",
            "tensor_parallel_degree",
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.loss:ChunkedLossWrapper.Config",
        used_for="the loss of every job, in chunks of the sequence",
        if_broken=NO_FLAVOR,
        fields=("loss_fn", "num_chunks"),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.loss:CrossEntropyLoss.Config",
        used_for="the loss of a chunk",
        if_broken=NO_FLAVOR,
        fields=("global_vocab_size",),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.config_utils:decoder_vocab_size",
        used_for="its vocabulary",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.components.optimizer:default_adamw",
        used_for="the optimizer of every job",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.components.validate:Validator.Config",
        used_for="where a job's [validation] goes",
        if_broken=NO_FLAVOR,
        fields=("dataloader", "enable"),
        vital=True,
    ),
    Reliance(
        "torchtitan.distributed.activation_checkpoint",
        used_for="where a job's [activation_checkpoint] goes, by its mode",
        if_broken=NO_FLAVOR,
        has=("ActivationCheckpointing", "FullAC", "MemoryBudgetAC", "SelectiveAC"),
        vital=True,
    ),
    Reliance(
        "torchtitan.distributed.activation_checkpoint:SelectiveAC.get_save_ops",
        used_for="the list of what selective checkpointing keeps, which the experts' products join",
        if_broken="selective checkpointing computes routed experts again in backward",
    ),
    Reliance(
        "torchtitan.models.common.token_dispatcher",
        used_for="which token dispatcher a model has",
        if_broken=NO_FLAVOR,
        has=(
            "DeepEPTokenDispatcher",
            "HybridEPTokenDispatcher",
            "LocalTokenDispatcher",
            "MinimalAsyncEPTokenDispatcher",
        ),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.token_dispatcher:update_ep_token_dispatcher_config",
        used_for="the host's own check of a token dispatcher, before a run",
        if_broken=NO_FLAVOR,
        takes=("model_config", "config"),
        vital=True,
    ),
)

_MODELS = (
    Reliance(
        "torchtitan.protocols.model_spec:ModelSpec",
        used_for="a flavor's model; its parallelize_fn is wrapped for FSDP over gloo",
        if_broken=NOTHING_TRAINS,
        has=("traverse",),
        fields=("name", "flavor", "model", "parallelize_fn", "pipelining_fn", "state_dict_adapter"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models",
        used_for="the host's own models, one module each: a flavor's `base`",
        if_broken=NO_FLAVOR,
        vital=True,
    ),
    Reliance(
        "torchtitan.models.deepseek_v3",
        used_for="model sizes that upstream does not have, with upstream's initial values",
        if_broken=NO_FLAVOR,
        # Two private names: `models.py` says why.
        has=("model_registry", "_build_dsv3_layers", "_output_linear_init"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.deepseek_v3:build_mla_moe_layers",
        # Called by `_build_dsv3_layers`, which takes any keyword and passes it on.
        used_for="the same: it takes the dimensions of a flavor",
        if_broken=NO_SIZES,
        takes=("moe_hidden_dim", "num_experts", "router_top_k", "rope", "attn_backend"),
    ),
    Reliance(
        "torchtitan.models.common:ComplexRoPE.Config",
        used_for="the same: positions",
        if_broken=NO_FLAVOR,
        fields=("dim", "max_seq_len", "theta", "scaling", "rope_factor", "original_seq_len"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.decoder:Decoder.Config",
        used_for="the same: the parts of a model around its layers",
        if_broken=NO_FLAVOR,
        fields=("dim", "vocab_size", "tok_embeddings", "norm", "lm_head", "layers"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.attention:BaseAttention.Config",
        used_for="finding the attention of every layer, and replacing its kernel",
        if_broken=NO_FLAVOR,
        fields=("n_heads", "inner_attention"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.attention",
        used_for="the kernels that SDPA replaces, where they have no backward",
        if_broken=NO_FLAVOR,
        has=("FlexAttention", "VarlenAttention"),
        vital=True,
    ),
    Reliance(
        "torchtitan.models.common.attention:ScaledDotProductAttention",
        used_for='attention = "sdpa" is a subclass of it',
        if_broken=NO_FLAVOR,
        takes=("config",),
        vital=True,
    ),
)

_CHECKPOINTS = (
    Reliance(
        "torchtitan.components.checkpointer:CheckpointManager",
        used_for="a job's checkpointer is a subclass of it",
        if_broken=NO_FLAVOR,
        has=("Config", "dcp_load", "dcp_save", "_load", "_save", "_wait_for_saving", "_close"),
        sets=("folder", "states", "load_only", "interval"),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.checkpointer:CheckpointManager.Config",
        used_for="a job keeps a whole last checkpoint",
        if_broken=NO_FLAVOR,
        fields=("last_save_model_only", "last_save_in_hf"),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.checkpointer",
        used_for="the names of a run's state, which a checkpoint may lack in part",
        if_broken=NO_FLAVOR,
        has=("MODEL", "OPTIMIZER", "DATALOADER", "LR_SCHEDULER", "TRAIN_STATE"),
        vital=True,
    ),
    Reliance(
        "torchtitan.tools:filesystem",
        used_for="telling a checkpoint on a disk from a remote one",
        if_broken=NO_FLAVOR,
        has=("is_remote",),
        vital=True,
    ),
    Reliance(
        "torchtitan.components.optimizer.lr_scheduler:LRSchedulersContainer.Config.build",
        used_for="the learning rate at which a job would resume, for `ezpz-moe doctor JOB.toml`",
        if_broken="`ezpz-moe doctor JOB.toml` does not know it",
        takes=("optimizers", "training_steps"),
    ),
)

# docs/internals/hosts.md shows the lines in this order.
RELIED_ON: tuple[Reliance, ...] = (
    Reliance(
        # torch's, because the host does not say which torch it needs.
        "torch.distributed:set_timeout",
        used_for="the host calls it after the first step (torch older than 2.14 lacks it)",
        if_broken=NOTHING_TRAINS,
        vital=True,
    ),
    *EXPERTS,
    *ROUTERS,
    *ANALYSIS,
    *CHATS,
    *CHANGES,
    *COMPONENTS,
    *_DOORS,
    *_JOB,
    *_CHECKPOINTS,
    *_MODELS,
    DATASET_CONFIG,
    Reliance(
        "torchtitan.hf_datasets.text_datasets:HuggingFaceTextDataLoader.Config",
        used_for="the dataloader of a job",
        if_broken=NO_FLAVOR,
        fields=("dataset", "dataset_path", "infinite"),
        vital=True,
    ),
    *OF_EVERY_GENERATION,
)

STATE_DICT_KEYS = (
    "layers.1.moe.routed_experts.inner_experts.w1_EFD",
    "layers.1.moe.routed_experts.inner_experts.w2_EDF",
    "layers.1.moe.routed_experts.inner_experts.w3_EFD",
    "layers.1.moe.router.gate.weight",
    "layers.1.moe.expert_bias_E",
)
"""Sample keys of a checkpoint of `debugmodel`: those of a layer with experts."""
