"""Every section and key of the trainer's TOML, as torchtitan 0.2 takes them.

The table is that of :mod:`ezpz_moe.hosts.titan_0_3.job_keys` with three differences: what is gone
from 0.3 is legal here, what 0.3 brought is refused unless it asks for what 0.2 does anyway, and
some choices are fewer. Which keys this very host has (0.2.1 lacks a few of 0.2.2's) is asked of its
dataclass when a run starts.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from ezpz_moe.hosts.titan_0_3.job_keys import KEYS as KEYS_0_3
from ezpz_moe.hosts.titan_0_3.job_keys import Key, Positive, Text, gone

_HAS_NO = "torchtitan 0.2 has no such setting. Remove the key{}. torchtitan 0.3 has it."
_WHAT_IT_DOES = ", or set it to {}, which is what 0.2 does"

# Values of keys that only 0.3 has which ask for what 0.2 does anyway.
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


KEYS: Mapping[str, Mapping[str, Key]] = {
    section: {name: _as_in_0_2(f"{section}.{name}", key) for name, key in keys.items()}
    for section, keys in KEYS_0_3.items()
}
