"""List the sections and keys of the trainer's TOML that torchtitan 0.2 and 0.3 both take.

The format is that of 0.2, which no longer changes. Each generation has a table of its own that adds
to this one: ``titan_0_2/job_keys.py`` and ``titan/job_keys.py``. If a newer host takes other values
for a key, the key leaves this file, and each of the two tables gets it with its own type. What 0.2
accepts then stays as it is: ``tests/hosts/test_titan_0_2.py`` compares it with a recorded list.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, MinLen

from ezpz_moe.config.keys import (
    Beta,
    Dtype,
    Fraction,
    MinusOneOrPositive,
    NonNegative,
    Positive,
    Rate,
    Seconds,
    Seed,
    Text,
)

ALIKE: Mapping[str, Mapping[str, Any]] = {
    "job": {
        "dump_folder": Text,
        "description": str,
        "print_config": bool,
        "save_config_file": Text,
    },
    "profiling": {
        "enable_profiling": bool,
        "save_traces_folder": Text,
        "profile_freq": Positive,
        "profiler_active": Positive,
        # torch's profiler can do without a warm-up, but not without a step to record.
        "profiler_warmup": NonNegative,
        "enable_memory_snapshot": bool,
        "save_memory_snapshot_folder": Text,
    },
    "metrics": {
        "log_freq": Positive,
        "enable_tensorboard": bool,
        "disable_color_printing": bool,
        "save_tb_folder": Text,
        "save_for_all_ranks": bool,
        "enable_wandb": bool,
    },
    "model": {
        "name": str,
        "flavor": Text,
        "hf_assets_path": Text,
    },
    "optimizer": {
        "name": Literal["Adam", "AdamW"],
        "lr": Rate,
        "beta1": Beta,
        "beta2": Beta,
        "eps": Rate,
        "weight_decay": Rate,
    },
    "lr_scheduler": {
        "warmup_steps": NonNegative,
        "total_steps": Positive,
        "decay_ratio": Fraction,
        "decay_type": Literal["linear", "sqrt", "cosine"],
        "min_lr_factor": Fraction,
    },
    "training": {
        "dataset": Text,
        "dataset_path": Text,
        "local_batch_size": Positive,
        # -1 means as little as possible: one microbatch of every rank.
        "global_batch_size": MinusOneOrPositive,
        "seq_len": Positive,
        # A norm of 0 would turn every gradient into zero.
        "max_norm": Annotated[float, Gt(0)],
        "steps": Positive,
        "enable_cpu_offload": bool,
        "dtype": Dtype,
        "mixed_precision_param": Dtype,
        # A key with one value, because the host's field has one.
        "mixed_precision_reduce": Literal["float32"],
        "gc_freq": Positive,
        "gc_debug": bool,
    },
    "training.dataloader": {
        "num_workers": NonNegative,
        "persistent_workers": bool,
        "pin_memory": bool,
        "prefetch_factor": Positive,
    },
    "parallelism": {
        "data_parallel_replicate_degree": Positive,
        # -1 means the ranks that the other degrees leave.
        "data_parallel_shard_degree": MinusOneOrPositive,
        "fsdp_reshard_after_forward": Literal["default", "always", "never"],
        "tensor_parallel_degree": Positive,
        "enable_async_tensor_parallel": bool,
        "pipeline_parallel_degree": Positive,
        # For each stage the names of its modules; a stage without any would have nothing to do.
        "module_fqns_per_model_part": Annotated[list[Annotated[list[Text], MinLen(1)]], MinLen(1)],
        "pipeline_parallel_first_stage_less_layers": NonNegative,
        "pipeline_parallel_last_stage_less_layers": NonNegative,
        "pipeline_parallel_layers_per_stage": Positive,
        "pipeline_parallel_schedule": Text,
        "pipeline_parallel_schedule_csv": str,
        "pipeline_parallel_microbatch_size": Positive,
        "context_parallel_degree": Positive,
        "context_parallel_load_balancer": Literal["headtail", "ptrr"],
        "expert_parallel_degree": Positive,
    },
    "checkpoint": {
        "enable": bool,
        "folder": Text,
        "interval": Positive,
        "initial_load_path": Text,
        "initial_load_model_only": bool,
        "initial_load_in_hf": bool,
        "initial_load_in_hf_quantized": bool,
        "last_save_model_only": bool,
        "last_save_in_hf": bool,
        "export_dtype": Literal["float16", "bfloat16", "float32"],
        "async_mode": Literal["disabled", "async", "async_with_pinned_mem"],
        # 0 keeps all. The host itself refuses 1, in a sentence that says why.
        "keep_latest_k": NonNegative,
        # -1 means the latest.
        "load_step": Annotated[int, Ge(-1)],
        "exclude_from_loading": list[Text],
        "enable_first_step_checkpoint": bool,
        "create_seed_checkpoint": bool,
        "load_only": bool,
    },
    "activation_checkpoint": {
        "mode": Literal["selective", "full", "memory_budget", "none"],
        "per_op_sac_force_recompute_mm_shapes_by_fqns": list[Text],
        "memory_budget": Fraction,
        "visualize_memory_budget_pareto": bool,
        "preserve_rng_state": bool,
        "determinism_check": Literal["default", "none"],
        "debug": bool,
    },
    "compile": {
        "enable": bool,
        "components": list[Literal["model", "loss"]],
        "backend": Text,
    },
    "comm": {
        "init_timeout_seconds": Seconds,
        "train_timeout_seconds": Seconds,
        # 0 turns torch's flight recorder off.
        "trace_buf_size": NonNegative,
        "save_traces_folder": Text,
        "save_traces_file_prefix": str,
    },
    "validation": {
        "enable": bool,
        "dataset": Text,
        "dataset_path": Text,
        "freq": Positive,
        "steps": MinusOneOrPositive,
    },
    "validation.dataloader": {
        "num_workers": NonNegative,
        "persistent_workers": bool,
        "pin_memory": bool,
        "prefetch_factor": Positive,
    },
    "debug": {
        "seed": Seed,
        "deterministic": bool,
        "deterministic_warn_only": bool,
        "moe_force_load_balance": bool,
    },
}
"""Section -> key -> the type of its values."""

FILES = frozenset({"model.hf_assets_path", "checkpoint.initial_load_path"})
"""Keys of these whose value names an existing file or folder."""
