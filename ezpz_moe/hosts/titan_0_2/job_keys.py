"""List every section and key of the trainer's TOML, as torchtitan 0.2 takes them.

:mod:`ezpz_moe.hosts.job_keys` has the keys that 0.3 takes in the same way. Here are those that 0.3
lacks, those with other choices there, and those that only 0.3 has. The last are refused, unless
they ask for what 0.2 does anyway. A key that a host after 0.3 brings is unknown here: nothing that
is done for a newer host changes this table. When a run starts, the host's own dataclass shows which
keys it has, because 0.2.1 lacks a few of 0.2.2's.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ezpz_moe.config.keys import Key, Keys, Positive, Text, gone
from ezpz_moe.hosts.job_keys import ALIKE, FILES

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
    "activation_checkpoint.experts": ("recompute",),
    "loss.num_chunks": (1,),
    "debug.spmd_typechecking": (False,),
    "debug.detect_anomaly": (False,),
    "debug.enable_structured_logging": (False,),
    "override.imports": ([],),
}

# Keys that only 0.3 has, and that never ask for what 0.2 does.
_NEVER_AS_0_2_DOES = (
    "profiling.memory_snapshot_freq",
    "profiling.memory_snapshot_max_entries",
    "parallelism.context_parallel_ptrr_mask_key",
)

# Keys that 0.3 lacks or takes otherwise.
_OTHERS: Mapping[str, Mapping[str, Any]] = {
    "job": {
        "config_file": Text,
        # The host merges one module, and without ours no flavor is known.
        "custom_config_module": Literal["", "ezpz_moe"],
    },
    "model": {
        "tokenizer_path": Text,
        "converters": list[Text],
        "print_after_conversion": bool,
    },
    "optimizer": {
        "early_step_in_backward": bool,
        "implementation": Literal["for-loop", "foreach", "fused"],  # 0.3 has more
    },
    "parallelism": {
        "disable_loss_parallel": bool,
        "pipeline_parallel_expert_parallel_overlap": bool,
        "context_parallel_rotate_method": Literal["allgather", "alltoall"],
        "expert_tensor_parallel_degree": Positive,
        "expert_parallel_comm_backend": Literal["standard", "deepep"],  # 0.3 has more
    },
    "checkpoint": {
        "enable_ft_dataloader_checkpoints": bool,
    },
    "activation_checkpoint": {
        "selective_ac_option": Text,
        "early_stop": bool,
    },
    "quantize.linear.float8": {
        "enable_fsdp_float8_all_gather": bool,
        "precompute_float8_dynamic_scale_for_fsdp": bool,
        "recipe_name": Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"],
        "filter_fqns": list[Text],
        "emulate": bool,
    },
    "quantize.linear.mx": {
        "mxfp8_dim1_cast_kernel_choice": Literal["triton", "cuda", "torch"],
        "recipe_name": Text,
        "filter_fqns": list[Text],
    },
    "quantize.grouped_mm.float8": {
        "fqns": list[Text] | Text,
    },
    "quantize.grouped_mm.mx": {
        "recipe_name": Literal["mxfp8"],
        "fqns": list[Text] | Text,
    },
    "memory_estimation": {
        "enable": bool,
        "disable_fake_mode": bool,
    },
    "fault_tolerance": {
        "enable": bool,
        "process_group": Text,
        "process_group_timeout_ms": Positive,
        "replica_id": int,
        "group_size": int,
        "min_replica_size": int,
        "semi_sync_method": Text,
    },
    "experimental": {
        "custom_import": str,
        "custom_args_module": str,
    },
    "validation": {
        "local_batch_size": Positive,
        "seq_len": Positive,
    },
    "comm": {
        "mode": Literal["default", "fake_backend", "local_tensor"],  # 0.3 has more
    },
}


def _taken() -> Iterator[tuple[str, str, Key]]:
    for table in (ALIKE, _OTHERS):
        for section, types in table.items():
            for name, type in types.items():
                yield section, name, Key(type=type, is_file=f"{section}.{name}" in FILES)


def _refused() -> Iterator[tuple[str, str, Key]]:
    for path, values in {**AS_0_2_DOES, **dict.fromkeys(_NEVER_AS_0_2_DOES, ())}.items():
        section, _, name = path.rpartition(".")
        remedy = _WHAT_IT_DOES.format(json.dumps(values[0])) if values else ""
        yield section, name, gone(_HAS_NO.format(remedy), unless=values)


def _table() -> Keys:
    table: dict[str, dict[str, Key]] = {}
    for section, name, key in (*_taken(), *_refused()):
        table.setdefault(section, {})[name] = key
    return table


KEYS: Keys = _table()

NO_EFFECT: tuple[tuple[str, str, Any, tuple[Any, ...]], ...] = (
    ("validation.", "validation.enable", False, (False,)),
    ("fault_tolerance.", "fault_tolerance.enable", False, (False,)),
    ("checkpoint.enable_ft_", "fault_tolerance.enable", False, (False,)),
    ("checkpoint.", "checkpoint.enable", False, (False,)),
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

CONVERTERS: Mapping[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in (
            "quantize.linear.float8",
            "quantize.linear.mx",
            "quantize.grouped_mm.float8",
            "quantize.grouped_mm.mx",
        )
    },
    # Before torchtitan 0.2: in September 2025 other names, and before one for linears and experts.
    "quantize.dense.float8": ("quantize.linear.float8",),
    "quantize.dense.mx": ("quantize.linear.mx",),
    "quantize.moe.float8": ("quantize.grouped_mm.float8",),
    "quantize.moe.mx": ("quantize.grouped_mm.mx",),
    "float8": ("quantize.linear.float8", "quantize.grouped_mm.float8"),
    "mx": ("quantize.linear.mx", "quantize.grouped_mm.mx"),
}
"""Torchtitan's own converters, and the sections that count only if ``model.converters`` has one."""

DATASETS = ("c4", "c4_test", "c4_validation")
"""Torchtitan's own texts, the same in 0.3. It asks for them in lower case."""

CHANGED_DEFAULTS: Mapping[str, tuple[Any, str | None]] = {
    "model.flavor": ("debugmodel", None),
    "model.hf_assets_path": ("./tests/assets/tokenizer", None),
    "training.dataset": ("c4_test", None),
    "validation.dataset": ("c4_validation", "validation.enable"),
    "checkpoint.last_save_model_only": (True, "checkpoint.enable"),
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
