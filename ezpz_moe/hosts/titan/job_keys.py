"""List every section and key of the trainer's TOML, and where torchtitan 0.3 keeps it.

The sections are those of torchtitan 0.2's job config. :mod:`ezpz_moe.config.keys` explains a row.
A key that is ``gone`` is still accepted with a value from ``unless``, which asks for what 0.3 does
anyway. One file can then serve both host generations. :mod:`ezpz_moe.hosts.titan.job` handles the
keys that are our ``own``.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, MinLen

from ezpz_moe.config.keys import (
    Beta,
    CommBackend,
    Dtype,
    Fraction,
    Keys,
    MinusOneOrPositive,
    NonNegative,
    Positive,
    Rate,
    Seconds,
    Seed,
    Text,
    gone,
    new,
    own,
    to,
)

# 0.3 has a list of parameter groups, and every job's optimizer has exactly one: `default_adamw()`.
_ADAMW = "optimizer.param_groups.0"
_ADAMW_KWARGS = f"{_ADAMW}.optimizer_kwargs"

_QUANTIZE = (
    "quantization replaces the same expert products that `compute_backend` selects, so the two "
    "cannot be combined. Leave it out; for quantized experts use an upstream config, such "
    "as `--module deepseek_v3 --config deepseek_v3_debugmodel_mxfp8`."
)
_FAULT_TOLERANCE = (
    "torchft left the trainer in torchtitan 0.3: it is an experiment with a trainer of its own, "
    "torchtitan.experiments.torchft. Leave it out."
)
_MEMORY_ESTIMATION = (
    "torchtitan 0.3 has no memory estimation. Leave it out; a short run's log lines show the peak "
    "memory."
)
_SUBCLASS = (
    "torchtitan 0.3 has no config modules: a plugin brings a config_registry, and this one is "
    "already loaded by `--module ezpz_moe`. Leave it out."
)

KEYS: Keys = {
    "job": {
        "config_file": gone(
            "the file is named on the command line: --module ezpz_moe --config PATH. Leave it out."
        ),
        "dump_folder": to("dump_folder", Text),
        "description": own(str),
        "print_config": to("debug.print_config", bool),
        "save_config_file": to("debug.save_config_file", Text),
        "custom_config_module": gone(_SUBCLASS, unless=("", "ezpz_moe")),
    },
    "profiling": {
        "enable_profiling": to("profiler.enable_profiling", bool),
        "save_traces_folder": to("profiler.save_traces_folder", Text),
        "profile_freq": to("profiler.profile_freq", Positive),
        "profiler_active": to("profiler.profiler_active", Positive),
        "profiler_warmup": to("profiler.profiler_warmup", NonNegative),
        "profiler_repeat": new("profiler.profiler_repeat", NonNegative),
        "profiler_skip_first": new("profiler.profiler_skip_first", NonNegative),
        "profiler_skip_first_wait": new("profiler.profiler_skip_first_wait", NonNegative),
        "enable_memory_snapshot": to("profiler.enable_memory_snapshot", bool),
        "save_memory_snapshot_folder": to("profiler.save_memory_snapshot_folder", Text),
        "memory_snapshot_freq": new("profiler.memory_snapshot_freq", Positive),
        "memory_snapshot_max_entries": new("profiler.memory_snapshot_max_entries", Positive),
    },
    "metrics": {
        "log_freq": to("metrics.log_freq", Positive),
        "enable_tensorboard": to("metrics.enable_tensorboard", bool),
        "disable_color_printing": to("metrics.disable_color_printing", bool),
        "save_tb_folder": to("metrics.save_tb_folder", Text),
        "save_for_all_ranks": to("metrics.save_for_all_ranks", bool),
        "enable_wandb": to("metrics.enable_wandb", bool),
    },
    "model": {
        "name": own(str, flag="module"),
        "flavor": own(Text, flag="config"),
        "hf_assets_path": to("hf_assets_path", Text, is_file=True),
        "tokenizer_path": gone("use hf_assets_path, the folder that holds tokenizer.json."),
        "converters": gone(_QUANTIZE, unless=([],)),
        "print_after_conversion": gone(
            "there are no converters between which to print the model; `ezpz-moe show` prints its "
            "config. Leave it out.",
            unless=(False,),
        ),
    },
    "optimizer": {
        "name": to(f"{_ADAMW}.optimizer_name", Literal["Adam", "AdamW"]),
        "lr": to(f"{_ADAMW_KWARGS}.lr", Rate),
        "beta1": to(f"{_ADAMW_KWARGS}.betas.0", Beta),
        "beta2": to(f"{_ADAMW_KWARGS}.betas.1", Beta),
        "eps": to(f"{_ADAMW_KWARGS}.eps", Rate),
        "weight_decay": to(f"{_ADAMW_KWARGS}.weight_decay", Rate),
        "implementation": to(
            "optimizer.implementation",
            Literal["for-loop", "foreach", "fused", "fused_opt_states_bf16"],
        ),
        "early_step_in_backward": gone(
            "torchtitan 0.3 steps the optimizer only after the whole backward. Leave it out.",
            unless=(False,),
        ),
    },
    "lr_scheduler": {
        "warmup_steps": to("lr_scheduler.warmup_steps", NonNegative),
        "total_steps": to("lr_scheduler.total_steps", Positive),
        "decay_ratio": to("lr_scheduler.decay_ratio", Fraction),
        "decay_type": to("lr_scheduler.decay_type", Literal["linear", "sqrt", "cosine"]),
        "min_lr_factor": to("lr_scheduler.min_lr_factor", Fraction),
    },
    "training": {
        "dataset": own(Text, flag="dataloader.dataset"),
        "dataset_path": own(Text, flag="dataloader.dataset_path"),
        "local_batch_size": to("training.local_batch_size", Positive),
        "global_batch_size": to("training.global_batch_size", MinusOneOrPositive),
        "seq_len": to("training.seq_len", Positive),
        "max_norm": to("training.max_norm", Annotated[float, Gt(0)]),
        "steps": to("training.steps", Positive),
        "enable_cpu_offload": to("training.enable_cpu_offload", bool),
        "disable_cuda_graphs": new("training.disable_cuda_graphs", bool),
        "dtype": to("training.dtype", Dtype),
        "mixed_precision_param": to("training.mixed_precision_param", Dtype),
        "mixed_precision_reduce": to("training.mixed_precision_reduce", Literal["float32"]),
        "gc_freq": to("training.gc_freq", Positive),
        "gc_debug": to("training.gc_debug", bool),
    },
    "training.dataloader": {
        "num_workers": to("dataloader.num_workers", NonNegative),
        "persistent_workers": to("dataloader.persistent_workers", bool),
        "pin_memory": to("dataloader.pin_memory", bool),
        "prefetch_factor": to("dataloader.prefetch_factor", Positive),
    },
    "parallelism": {
        "data_parallel_replicate_degree": to(
            "parallelism.data_parallel_replicate_degree", Positive
        ),
        "data_parallel_shard_degree": to(
            "parallelism.data_parallel_shard_degree", MinusOneOrPositive
        ),
        "fsdp_reshard_after_forward": to(
            "parallelism.fsdp_reshard_after_forward", Literal["default", "always", "never"]
        ),
        "enable_fsdp_symm_mem": new("parallelism.enable_fsdp_symm_mem", bool),
        "tensor_parallel_degree": to("parallelism.tensor_parallel_degree", Positive),
        "enable_sequence_parallel": new("parallelism.enable_sequence_parallel", bool),
        "disable_loss_parallel": gone(
            "torchtitan 0.3 always computes the loss in parallel under tensor parallelism. "
            "Leave it out.",
            unless=(False,),
        ),
        "enable_async_tensor_parallel": to("compile.enable_async_tensor_parallel", bool),
        "spmd_backend": new(
            "parallelism.spmd_backend", Literal["partial_dtensor", "full_dtensor", "spmd_types"]
        ),
        "pipeline_parallel_degree": to("parallelism.pipeline_parallel_degree", Positive),
        "module_fqns_per_model_part": to(
            "parallelism.module_fqns_per_model_part",
            Annotated[list[Annotated[list[Text], MinLen(1)]], MinLen(1)],
        ),
        "pipeline_parallel_first_stage_less_layers": to(
            "parallelism.pipeline_parallel_first_stage_less_layers", NonNegative
        ),
        "pipeline_parallel_last_stage_less_layers": to(
            "parallelism.pipeline_parallel_last_stage_less_layers", NonNegative
        ),
        "pipeline_parallel_layers_per_stage": to(
            "parallelism.pipeline_parallel_layers_per_stage", Positive
        ),
        "pipeline_parallel_schedule": to("parallelism.pipeline_parallel_schedule", Text),
        "pipeline_parallel_schedule_csv": to("parallelism.pipeline_parallel_schedule_csv", str),
        "pipeline_parallel_microbatch_size": to(
            "parallelism.pipeline_parallel_microbatch_size", Positive
        ),
        "pipeline_parallel_expert_parallel_overlap": gone(
            "torchtitan 0.3 does not overlap the two communications. Leave it out, or set it to "
            "false in a file that 0.2 reads too.",
            unless=(False,),
        ),
        "context_parallel_degree": to("parallelism.context_parallel_degree", Positive),
        "context_parallel_load_balancer": to(
            "parallelism.context_parallel_load_balancer", Literal["headtail", "ptrr"]
        ),
        "context_parallel_ptrr_mask_key": new("parallelism.context_parallel_ptrr_mask_key", Text),
        "context_parallel_rotate_method": gone(
            "torchtitan 0.3 leaves the exchange of keys and values to torch, which gathers them. "
            "Leave it out.",
            unless=("allgather",),
        ),
        "expert_parallel_degree": to("parallelism.expert_parallel_degree", Positive),
        "expert_tensor_parallel_degree": gone(
            "in torchtitan 0.3, expert parallelism takes its ranks from FSDP and tensor "
            "parallelism, which is what 1 means in 0.2. Set only expert_parallel_degree.",
            unless=(1,),
        ),
        "expert_parallel_comm_backend": own(CommBackend),
    },
    "checkpoint": {
        "enable": to("checkpoint.enable", bool),
        "enable_ft_dataloader_checkpoints": gone(_FAULT_TOLERANCE, unless=(True,)),
        "folder": to("checkpoint.folder", Text),
        "interval": to("checkpoint.interval", Positive),
        "initial_load_path": to("checkpoint.initial_load_path", Text, is_file=True),
        "initial_load_model_only": to("checkpoint.initial_load_model_only", bool),
        "initial_load_in_hf": to("checkpoint.initial_load_in_hf", bool),
        "initial_load_in_hf_quantized": to("checkpoint.initial_load_in_hf_quantized", bool),
        "last_save_model_only": to("checkpoint.last_save_model_only", bool),
        "last_save_in_hf": to("checkpoint.last_save_in_hf", bool),
        "export_dtype": to("checkpoint.export_dtype", Literal["float16", "bfloat16", "float32"]),
        "async_mode": to(
            "checkpoint.async_mode", Literal["disabled", "async", "async_with_pinned_mem"]
        ),
        "keep_latest_k": to("checkpoint.keep_latest_k", NonNegative),
        "load_step": to("checkpoint.load_step", Annotated[int, Ge(-1)]),
        "exclude_from_loading": to("checkpoint.exclude_from_loading", list[Text]),
        "enable_first_step_checkpoint": to("checkpoint.enable_first_step_checkpoint", bool),
        "create_seed_checkpoint": to("checkpoint.create_seed_checkpoint", bool),
        "load_only": to("checkpoint.load_only", bool),
    },
    "activation_checkpoint": {
        "mode": own(Literal["selective", "full", "memory_budget", "none"]),
        "selective_ac_option": gone(
            "torchtitan 0.3's selective checkpointing always chooses by operator ('op' in 0.2), "
            'not by every n-th layer. Leave it out, or set it to "op".',
            unless=("op",),
        ),
        "per_op_sac_force_recompute_mm_shapes_by_fqns": to(
            "activation_checkpoint.force_recompute_mm_shapes_by_fqns", list[Text]
        ),
        "early_stop": gone(
            "torchtitan 0.3 never stops a recomputation early. Leave it out.", unless=(False,)
        ),
        "memory_budget": to("activation_checkpoint.memory_budget", Fraction),
        "visualize_memory_budget_pareto": to(
            "activation_checkpoint.visualize_memory_budget_pareto", bool
        ),
        "preserve_rng_state": to("activation_checkpoint.preserve_rng_state", bool),
        "determinism_check": to(
            "activation_checkpoint.determinism_check", Literal["default", "none"]
        ),
        "debug": to("activation_checkpoint.debug", bool),
    },
    "compile": {
        "enable": to("compile.enable", bool),
        "components": to("compile.components", list[Literal["model", "loss"]]),
        "backend": to("compile.backend", Text),
    },
    "loss": {
        "num_chunks": new("loss.num_chunks", Positive),
    },
    "quantize.linear.float8": {
        "enable_fsdp_float8_all_gather": gone(_QUANTIZE),
        "precompute_float8_dynamic_scale_for_fsdp": gone(_QUANTIZE),
        "recipe_name": gone(_QUANTIZE),
        "filter_fqns": gone(_QUANTIZE),
        "emulate": gone(_QUANTIZE),
    },
    "quantize.linear.mx": {
        "mxfp8_dim1_cast_kernel_choice": gone(_QUANTIZE),
        "recipe_name": gone(_QUANTIZE),
        "filter_fqns": gone(_QUANTIZE),
    },
    "quantize.grouped_mm.float8": {
        "fqns": gone(_QUANTIZE),
    },
    "quantize.grouped_mm.mx": {
        "recipe_name": gone(_QUANTIZE),
        "fqns": gone(_QUANTIZE),
    },
    "comm": {
        "init_timeout_seconds": to("comm.init_timeout_seconds", Seconds),
        "train_timeout_seconds": to("comm.train_timeout_seconds", Seconds),
        "trace_buf_size": to("comm.trace_buf_size", NonNegative),
        "save_traces_folder": to("comm.save_traces_folder", Text),
        "save_traces_file_prefix": to("comm.save_traces_file_prefix", str),
        "mode": to("comm.mode", Literal["default", "fake_backend", "local_tensor", "torchcomms"]),
    },
    "memory_estimation": {
        "enable": gone(_MEMORY_ESTIMATION, unless=(False,)),
        "disable_fake_mode": gone(_MEMORY_ESTIMATION, unless=(False,)),
    },
    "fault_tolerance": {
        "enable": gone(_FAULT_TOLERANCE, unless=(False,)),
        "process_group": gone(_FAULT_TOLERANCE),
        "process_group_timeout_ms": gone(_FAULT_TOLERANCE),
        "replica_id": gone(_FAULT_TOLERANCE),
        "group_size": gone(_FAULT_TOLERANCE),
        "min_replica_size": gone(_FAULT_TOLERANCE),
        "semi_sync_method": gone(_FAULT_TOLERANCE),
    },
    "experimental": {
        "custom_import": gone(_SUBCLASS, unless=("", "ezpz_moe")),
        "custom_args_module": gone(_SUBCLASS, unless=("",)),
    },
    "validation": {
        "enable": to("validator.enable", bool),
        "dataset": own(Text, flag="validator.dataloader.dataset"),
        "dataset_path": own(Text, flag="validator.dataloader.dataset_path"),
        "local_batch_size": gone(
            "torchtitan 0.3 validates with training.local_batch_size. Leave it out."
        ),
        "seq_len": gone("torchtitan 0.3 validates with training.seq_len. Leave it out."),
        "freq": to("validator.freq", Positive),
        "steps": to("validator.steps", MinusOneOrPositive),
    },
    "validation.dataloader": {
        "num_workers": to("validator.dataloader.num_workers", NonNegative),
        "persistent_workers": to("validator.dataloader.persistent_workers", bool),
        "pin_memory": to("validator.dataloader.pin_memory", bool),
        "prefetch_factor": to("validator.dataloader.prefetch_factor", Positive),
    },
    "debug": {
        "seed": to("debug.seed", Seed),
        "deterministic": to("debug.deterministic", bool),
        "deterministic_warn_only": to("debug.deterministic_warn_only", bool),
        "moe_force_load_balance": to("debug.moe_force_load_balance", bool),
        "spmd_typechecking": new("debug.spmd_typechecking", bool),
        "detect_anomaly": new("debug.detect_anomaly", bool),
        "enable_structured_logging": new("debug.enable_structured_logging", bool),
    },
    "override": {
        "imports": new("override.imports", list[Text]),
    },
}
