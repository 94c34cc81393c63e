"""List every section and key of the trainer's TOML, and where torchtitan 0.3 keeps it.

The sections are those of torchtitan 0.2's job config. :mod:`ezpz_moe.hosts.job_keys` has the keys
that 0.2 takes in the same way; here is where 0.3 keeps them, and every other key.
:mod:`ezpz_moe.config.keys` explains a row. A key that is ``gone`` is still accepted with a value
from ``unless``, which asks for what 0.3 does anyway. One file can then serve both host generations.
:mod:`ezpz_moe.hosts.titan.job` handles the keys that are our ``own``.

Pure data: this file imports neither torch nor torchtitan.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ezpz_moe.config.keys import (
    CommBackend,
    Key,
    Keys,
    NonNegative,
    Positive,
    Rate,
    Text,
    gone,
    new,
    own,
    to,
)
from ezpz_moe.config.schema import Steps
from ezpz_moe.config.telemetry_schema import Detail, NumberOfPairs, Rise, Share
from ezpz_moe.config.train_only import Share as ShareOfTokens
from ezpz_moe.hosts.job_keys import ALIKE, FILES

# --- keys of ALIKE: 0.3 keeps them under their own section and name, but for these ----------------

_SECTIONS: Mapping[str, str] = {
    "profiling": "profiler",
    "training.dataloader": "dataloader",
    "validation": "validator",
    "validation.dataloader": "validator.dataloader",
}

# 0.3 has a list of parameter groups, and every job's optimizer has exactly one: `default_adamw()`.
_ADAMW = "optimizer.param_groups.0"
_ADAMW_KWARGS = f"{_ADAMW}.optimizer_kwargs"

_PATHS: Mapping[str, str] = {
    "job.dump_folder": "dump_folder",
    "job.print_config": "debug.print_config",
    "job.save_config_file": "debug.save_config_file",
    "model.hf_assets_path": "hf_assets_path",
    "optimizer.name": f"{_ADAMW}.optimizer_name",
    "optimizer.lr": f"{_ADAMW_KWARGS}.lr",
    "optimizer.beta1": f"{_ADAMW_KWARGS}.betas.0",
    "optimizer.beta2": f"{_ADAMW_KWARGS}.betas.1",
    "optimizer.eps": f"{_ADAMW_KWARGS}.eps",
    "optimizer.weight_decay": f"{_ADAMW_KWARGS}.weight_decay",
    "parallelism.enable_async_tensor_parallel": "compile.enable_async_tensor_parallel",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (
        "activation_checkpoint.force_recompute_mm_shapes_by_fqns"
    ),
}

# Keys that we read, because no single field takes the value: with the host's flag, if it has one.
_OURS: Mapping[str, str | None] = {
    "job.description": None,
    "model.name": "module",
    "model.flavor": "config",
    "training.dataset": "dataloader.dataset",
    "training.dataset_path": "dataloader.dataset_path",
    "activation_checkpoint.mode": None,
    "validation.dataset": "validator.dataloader.dataset",
    "validation.dataset_path": "validator.dataloader.dataset_path",
}

# --- all other keys -------------------------------------------------------------------------------

_QUANTIZE = (
    "quantization replaces the same expert products that `compute_backend` selects, so the two "
    "cannot be combined. Leave it out; for quantized experts use an upstream config, such "
    "as `--module deepseek_v3 --config deepseek_v3_debugmodel_mxfp8`."
)
_CONVERTERS = (
    "torchtitan 0.3 converts a model where its config is made, in Python, and a job has no key for "
    "that. Leave it out. Converters of linears work with every `compute_backend`: train a config "
    "of torchtitan's or of your own that has them, with `--override.imports "
    "'ezpz_moe.overrides.experts={\"compute_backend\": ...}'`. Those of the experts replace the "
    "products that `compute_backend` selects, so the two cannot be combined."
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

_OTHERS: Keys = {
    "job": {
        "config_file": gone(
            "the file is named on the command line: --module ezpz_moe --config PATH. Leave it out."
        ),
        # A job that both hosts read names us here, as the shipped ones do.
        "custom_config_module": gone(_SUBCLASS, unless=("", "ezpz_moe")),
    },
    "profiling": {
        "profiler_repeat": new("profiler.profiler_repeat", NonNegative),
        "profiler_skip_first": new("profiler.profiler_skip_first", NonNegative),
        "profiler_skip_first_wait": new("profiler.profiler_skip_first_wait", NonNegative),
        "memory_snapshot_freq": new("profiler.memory_snapshot_freq", Positive),
        "memory_snapshot_max_entries": new("profiler.memory_snapshot_max_entries", Positive),
    },
    "model": {
        "tokenizer_path": gone("use hf_assets_path, the folder that holds tokenizer.json."),
        # An empty list quantizes nothing.
        "converters": gone(_CONVERTERS, unless=([],)),
        "print_after_conversion": gone(
            "there are no converters between which to print the model; `ezpz-moe show` prints its "
            "config. Leave it out.",
            unless=(False,),
        ),
    },
    "optimizer": {
        "implementation": to(
            "optimizer.implementation",
            Literal["for-loop", "foreach", "fused", "fused_opt_states_bf16"],
        ),
        "early_step_in_backward": gone(
            "torchtitan 0.3 steps the optimizer only after the whole backward. Leave it out.",
            unless=(False,),
        ),
    },
    "training": {
        "disable_cuda_graphs": new("training.disable_cuda_graphs", bool),
    },
    "parallelism": {
        "enable_fsdp_symm_mem": new("parallelism.enable_fsdp_symm_mem", bool),
        "enable_sequence_parallel": new("parallelism.enable_sequence_parallel", bool),
        "disable_loss_parallel": gone(
            "torchtitan 0.3 always computes the loss in parallel under tensor parallelism. "
            "Leave it out.",
            unless=(False,),
        ),
        "spmd_backend": new(
            "parallelism.spmd_backend", Literal["partial_dtensor", "full_dtensor", "spmd_types"]
        ),
        "pipeline_parallel_expert_parallel_overlap": gone(
            "torchtitan 0.3 does not overlap the two communications. Leave it out, or set it to "
            "false in a file that 0.2 reads too.",
            unless=(False,),
        ),
        "context_parallel_ptrr_mask_key": new("parallelism.context_parallel_ptrr_mask_key", Text),
        "context_parallel_rotate_method": gone(
            "torchtitan 0.3 leaves the exchange of keys and values to torch, which gathers them. "
            "Leave it out.",
            unless=("allgather",),
        ),
        "expert_tensor_parallel_degree": gone(
            "in torchtitan 0.3, expert parallelism takes its ranks from FSDP and tensor "
            "parallelism, which is what 1 means in 0.2. Set only expert_parallel_degree.",
            unless=(1,),
        ),
        # No field of the config has it: the host's model builders take it as an argument.
        "expert_parallel_comm_backend": own(CommBackend),
    },
    "checkpoint": {
        # true is 0.2's default, and has no effect there without fault tolerance.
        "enable_ft_dataloader_checkpoints": gone(_FAULT_TOLERANCE, unless=(True,)),
    },
    "activation_checkpoint": {
        "experts": new("activation_checkpoint.experts", Literal["save", "recompute"]),
        "selective_ac_option": gone(
            "torchtitan 0.3's selective checkpointing always chooses by operator ('op' in 0.2), "
            'not by every n-th layer. Leave it out, or set it to "op".',
            unless=("op",),
        ),
        "early_stop": gone(
            "torchtitan 0.3 never stops a recomputation early. Leave it out.", unless=(False,)
        ),
    },
    "loss": {
        "num_chunks": new("loss.num_chunks", Positive),
    },
    "quantize.linear.float8": {
        "enable_fsdp_float8_all_gather": gone(_CONVERTERS),
        "precompute_float8_dynamic_scale_for_fsdp": gone(_CONVERTERS),
        "recipe_name": gone(_CONVERTERS),
        "filter_fqns": gone(_CONVERTERS),
        "emulate": gone(_CONVERTERS),
    },
    "quantize.linear.mx": {
        "mxfp8_dim1_cast_kernel_choice": gone(_CONVERTERS),
        "recipe_name": gone(_CONVERTERS),
        "filter_fqns": gone(_CONVERTERS),
    },
    "quantize.grouped_mm.float8": {
        "fqns": gone(_QUANTIZE),
    },
    "quantize.grouped_mm.mx": {
        "recipe_name": gone(_QUANTIZE),
        "fqns": gone(_QUANTIZE),
    },
    "comm": {
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
        # Nothing is accepted here: whether a value says the same depends on another key.
        "local_batch_size": gone(
            "torchtitan 0.3 validates with training.local_batch_size. Leave it out."
        ),
        "seq_len": gone("torchtitan 0.3 validates with training.seq_len. Leave it out."),
    },
    "debug": {
        "spmd_typechecking": new("debug.spmd_typechecking", bool),
        "detect_anomaly": new("debug.detect_anomaly", bool),
        "enable_structured_logging": new("debug.enable_structured_logging", bool),
    },
    # Over the flavor's own. A flavor's `dump` is a table, which no key of a job is.
    "telemetry": {
        "every": own(Steps, since_0_3=True),
        "detail": own(Detail, since_0_3=True),
        "images": own(bool, since_0_3=True),
        "pairs": own(NumberOfPairs, since_0_3=True),
        "alert_dead_steps": own(Steps, since_0_3=True),
        "alert_cv_rise": own(Rise, since_0_3=True),
        "alert_collapse": own(Share, since_0_3=True),
    },
    "train_only": {
        # By number of a layer, or a file.
        "experts": own(dict[str, list[NonNegative]] | Text, since_0_3=True),
        "router": own(bool, since_0_3=True),
        "share": own(ShareOfTokens, since_0_3=True),
        "anchor": own(Rate, since_0_3=True),
    },
    "override": {
        # Names alone: keyword arguments of an override can be given as a flag.
        "imports": new("override.imports", list[Text]),
    },
}


def _alike(section: str, name: str, type: Any) -> Key:
    key = f"{section}.{name}"
    if key in _OURS:
        return own(type, flag=_OURS[key])
    path = _PATHS.get(key, f"{_SECTIONS.get(section, section)}.{name}")
    return to(path, type, is_file=key in FILES)


KEYS: Keys = {
    section: {
        **{name: _alike(section, name, type) for name, type in ALIKE.get(section, {}).items()},
        **_OTHERS.get(section, {}),
    }
    for section in dict.fromkeys((*ALIKE, *_OTHERS))
}
