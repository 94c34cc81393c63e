"""List every section and key of the trainer's TOML, as torchtitan 0.2 takes them.

The table is that of :mod:`ezpz_moe.hosts.titan.job_keys` with three differences. Keys that are gone
from 0.3 are legal here. Keys that are new in 0.3 are refused, unless they ask for what 0.2 does
anyway. And some keys have fewer choices. When a run starts, the host's own dataclass shows which
keys it has, because 0.2.1 lacks a few of 0.2.2's.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from ezpz_moe.config.keys import Key, Keys, Positive, Text, gone
from ezpz_moe.hosts.titan.job_keys import KEYS as KEYS_0_3

_HAS_NO = "torchtitan 0.2 has no such setting. Leave it out{}. torchtitan 0.3 has it."
_WHAT_IT_DOES = ", or set it to {}, which is what 0.2 does"

# Keys that only 0.3 has, and the values that ask for what 0.2 does anyway.
AS_0_2_DOES: Mapping[str, tuple[Any, ...]] = {
    "profiling.profiler_repeat": (0,),
    "profiling.profiler_skip_first": (0,),
    "profiling.profiler_skip_first_wait": (0,),
    "training.disable_cuda_graphs": (True,),
    "parallelism.enable_fsdp_symm_mem": (False,),
    "parallelism.enable_sequence_parallel": (True,),
    "parallelism.spmd_backend": ("partial_dtensor",),
    "loss.num_chunks": (1,),
    "debug.spmd_typechecking": (False,),
    "debug.detect_anomaly": (False,),
    "debug.enable_structured_logging": (False,),
    "override.imports": ([],),
}

_TYPES: Mapping[str, Any] = {
    # Gone from 0.3.
    "job.config_file": Text,
    "job.custom_config_module": Literal["", "ezpz_moe"],  # the host takes one, and we are it
    "model.tokenizer_path": Text,
    "model.converters": list[Text],
    "model.print_after_conversion": bool,
    "optimizer.early_step_in_backward": bool,
    "parallelism.disable_loss_parallel": bool,
    "parallelism.pipeline_parallel_expert_parallel_overlap": bool,
    "parallelism.context_parallel_rotate_method": Literal["allgather", "alltoall"],
    "parallelism.expert_tensor_parallel_degree": Positive,
    "checkpoint.enable_ft_dataloader_checkpoints": bool,
    "activation_checkpoint.selective_ac_option": Text,
    "activation_checkpoint.early_stop": bool,
    "quantize.linear.float8.enable_fsdp_float8_all_gather": bool,
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": bool,
    "quantize.linear.float8.recipe_name": Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"],
    "quantize.linear.float8.filter_fqns": list[Text],
    "quantize.linear.float8.emulate": bool,
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": Literal["triton", "cuda", "torch"],
    "quantize.linear.mx.recipe_name": Text,
    "quantize.linear.mx.filter_fqns": list[Text],
    "quantize.grouped_mm.float8.fqns": list[Text] | Text,
    "quantize.grouped_mm.mx.recipe_name": Literal["mxfp8"],
    "quantize.grouped_mm.mx.fqns": list[Text] | Text,
    "memory_estimation.enable": bool,
    "memory_estimation.disable_fake_mode": bool,
    "fault_tolerance.enable": bool,
    "fault_tolerance.process_group": Text,
    "fault_tolerance.process_group_timeout_ms": Positive,
    "fault_tolerance.replica_id": int,
    "fault_tolerance.group_size": int,
    "fault_tolerance.min_replica_size": int,
    "fault_tolerance.semi_sync_method": Text,
    "experimental.custom_import": str,
    "experimental.custom_args_module": str,
    "validation.local_batch_size": Positive,
    "validation.seq_len": Positive,
    # Fewer choices than in 0.3.
    "optimizer.implementation": Literal["for-loop", "foreach", "fused"],
    "parallelism.expert_parallel_comm_backend": Literal["standard", "deepep"],
    "comm.mode": Literal["default", "fake_backend", "local_tensor"],
}


def _as_in_0_2(path: str, key: Key) -> Key:
    if key.since_0_3:
        does = AS_0_2_DOES.get(path, ())
        remedy = _WHAT_IT_DOES.format(json.dumps(does[0])) if does else ""
        return gone(_HAS_NO.format(remedy), unless=does)
    return Key(type=_TYPES.get(path, key.type), is_file=key.is_file)


KEYS: Keys = {
    section: {name: _as_in_0_2(f"{section}.{name}", key) for name, key in keys.items()}
    for section, keys in KEYS_0_3.items()
}

NO_EFFECT: tuple[tuple[str, str, Any, tuple[Any, ...]], ...] = (
    ("quantize.", "model.converters", [], ([],)),
    ("validation.", "validation.enable", False, (False,)),
    ("fault_tolerance.", "fault_tolerance.enable", False, (False,)),
    ("checkpoint.enable_ft_", "fault_tolerance.enable", False, (False,)),
    ("memory_estimation.", "memory_estimation.enable", False, (False,)),
    ("parallelism.disable_loss_parallel", "parallelism.tensor_parallel_degree", 1, (1,)),
    ("parallelism.context_parallel_rotate_", "parallelism.context_parallel_degree", 1, (1,)),
    ("parallelism.expert_tensor_", "parallelism.expert_parallel_degree", 1, (1,)),
    ("parallelism.pipeline_parallel_expert_", "parallelism.pipeline_parallel_degree", 1, (1,)),
    ("parallelism.pipeline_parallel_expert_", "parallelism.expert_parallel_degree", 1, (1,)),
    *(
        (f"activation_checkpoint.{option}", "activation_checkpoint.mode", "selective", modes)
        for option, modes in {
            "selective_ac_option": ("full", "memory_budget", "none"),
            "per_op_sac_": ("full", "memory_budget", "none"),
            "memory_budget": ("selective", "full", "none"),
            "visualize_memory_budget_": ("selective", "full", "none"),
            "early_stop": ("none",),
            "preserve_rng_state": ("none",),
            "determinism_check": ("none",),
            "debug": ("none",),
        }.items()
    ),
)
"""Settings that count only together with another: the prefix of their keys, the other key, its
default, and its values that make them ineffective."""

CHANGED_DEFAULTS: Mapping[str, tuple[Any, str | None]] = {
    "model.flavor": ("debugmodel", None),
    "model.hf_assets_path": ("./tests/assets/tokenizer", None),
    "training.dataset": ("c4_test", None),
    "validation.dataset": ("c4_validation", "validation.enable"),
    "profiling.save_traces_folder": ("profile_traces", "profiling.enable_profiling"),
    "profiling.save_memory_snapshot_folder": (
        "memory_snapshot",
        "profiling.enable_memory_snapshot",
    ),
}
"""Defaults that differ in a job for 0.3, and the switch that they depend on, if any."""

LOST_DEFAULTS: Mapping[str, tuple[Any, str]] = {
    "activation_checkpoint.selective_ac_option": (
        "2",
        "0.2 checkpoints every second layer, 0.3 operators of every layer",
    ),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (
        True,
        "0.3 does not overlap the two communications",
    ),
    "validation.local_batch_size": (8, "0.3 validates with training.local_batch_size"),
    "validation.seq_len": (2048, "0.3 validates with training.seq_len"),
}
"""Defaults that had an effect, of keys that are gone, and what 0.3 does instead."""
