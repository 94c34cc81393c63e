"""Keys of the trainer's TOML that torchtitan 0.2 no longer takes, and what it calls each now.

Job files live longer than the trainer's names: many still have those of 2024. ``ezpz-moe convert``
moves such a key to its successor, and the message about an unknown key names it. A successor does
the same thing: a key of a similar name that does another has no place here.

Of the releases, 0.1.0 and 0.2.0 have such keys (``tests/data/titan_older_keys.txt``); the others
are of the months before and between them, when torchtitan was used from its repository.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ezpz_moe.config.keys import Keys
from ezpz_moe.config.toml_edit import assignment


@dataclass(frozen=True)
class OlderKey:
    """What became of a key.

    Attributes:
        now: ``section.name`` in torchtitan 0.2; empty if it has no such setting.
        value: turns the old key's value into the new one's, where they differ; returns None for a
            value that has none.
        unless: values of a key without a successor that ask for what 0.2 does anyway.
        is_idle: it never changed a training.
        note: how the values differ, or what to do without a successor.
    """

    now: str = ""
    value: Callable[[Any], Any] | None = None
    unless: tuple[Any, ...] = ()
    is_idle: bool = False
    note: str = ""

    def renewed(self, value: Any) -> Any:
        """Return the successor's value, or None if it has none that says the same."""
        return value if self.value is None else self.value(value)

    @property
    def place(self) -> str:
        """The successor as it is written: "[compile] enable"."""
        section, _, name = self.now.rpartition(".")
        return f"[{section}] {name}"


def _now(key: str) -> OlderKey:
    return OlderKey(now=key)


def _opposite(key: str) -> OlderKey:
    return OlderKey(now=key, value=_switch(False, True), note="with the opposite value")


def _switch(on: Any, off: Any) -> Callable[[Any], Any]:
    """Return what turns true and false into other values, and anything else into None."""
    return lambda value: (on if value else off) if isinstance(value, bool) else None


def _none(note: str, *, unless: tuple[Any, ...] = ()) -> OlderKey:
    return OlderKey(note=note, unless=unless)


def _assets(tokenizer: Any) -> Any:
    """Return the folder of a tokenizer: itself, or that of its file."""
    if not isinstance(tokenizer, str):
        return None
    path = PurePosixPath(tokenizer)
    return str(path.parent) if path.suffix in (".json", ".model") else tokenizer


def _float8(switch: Any) -> Any:
    """Return the converters that a switch of 2024 stands for: a boolean, or the empty string."""
    if not isinstance(switch, bool | str):
        return None
    return ["quantize.linear.float8"] if switch else []


_FLOAT8 = OlderKey(
    now="model.converters", value=_float8, note='on is ["quantize.linear.float8"], off is []'
)
_SPLIT_POINTS = (
    "torchtitan 0.2 and 0.3 have no split points: [parallelism] module_fqns_per_model_part lists "
    "the modules of each stage."
)
_MICROBATCHES = (
    "torchtitan 0.2 and 0.3 take the size of a microbatch, not their number: [parallelism] "
    "pipeline_parallel_microbatch_size."
)
_COMPILED_AUTOGRAD = "torchtitan 0.2 and 0.3 have no compiled autograd. Leave it out."
_OF_FLOAT8 = "no release since 0.2.0 has it. Leave it out."
_CHECKPOINTS = (
    "a folder turned checkpoints on: set [checkpoint] enable = true, and its folder and interval."
)
_SECONDS = "torchtitan 0.2 and 0.3 count [checkpoint] interval in steps, not in seconds."
_ATTENTION = 'a flavor says its attention, in its name or file: "flex", "sdpa" or "varlen".'
_SEMI_SYNC = "torchft's semi-synchronous training has its own section since 0.2. Leave it out."

_PARALLEL = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "tensor_parallel_degree",
    "enable_async_tensor_parallel",
    "disable_loss_parallel",
    "fsdp_reshard_after_forward",
    "context_parallel_degree",
    "context_parallel_rotate_method",
    "pipeline_parallel_degree",
    "pipeline_parallel_schedule",
    "pipeline_parallel_schedule_csv",
    "pipeline_parallel_layers_per_stage",
    "pipeline_parallel_microbatch_size",
)

_OF_LINEARS = {
    "float8": (
        "emulate",
        "enable_fsdp_float8_all_gather",
        "filter_fqns",
        "precompute_float8_dynamic_scale_for_fsdp",
        "recipe_name",
    ),
    "mx": ("filter_fqns", "mxfp8_dim1_cast_kernel_choice", "recipe_name"),
}

OLDER_KEYS: Mapping[str, OlderKey] = {
    "job.print_args": _now("job.print_config"),
    "job.use_for_integration_test": OlderKey(
        note="it only marked the files that torchtitan's own tests run.", is_idle=True
    ),
    "profiling.run_profiler": _now("profiling.enable_profiling"),
    "profiling.profile_every_x_iter": _now("profiling.profile_freq"),
    "metrics.enable_color_printing": _opposite("metrics.disable_color_printing"),
    "metrics.rank_0_only": _opposite("metrics.save_for_all_ranks"),
    "model.tokenizer_path": OlderKey(
        now="model.hf_assets_path",
        value=_assets,
        note="the folder that holds tokenizer.json",
    ),
    "model.norm_type": _none(
        "torchtitan 0.2 and 0.3 have RMSNorm alone. Leave it out.",
        # Three kernels of one function.
        unless=("rmsnorm", "fused_rmsnorm", "compiled_rmsnorm"),
    ),
    "model.use_flex_attn": _none(_ATTENTION, unless=(False,)),
    "model.attn_mask_type": _none(_ATTENTION, unless=("causal",)),
    "optimizer.fused": OlderKey(
        now="optimizer.implementation",
        # Without it, torch chose foreach on a GPU.
        value=_switch("fused", "foreach"),
        note='true is "fused", false is "foreach"',
    ),
    "lr_scheduler.lr_min": _now("lr_scheduler.min_lr_factor"),
    "training.batch_size": _now("training.local_batch_size"),
    "training.warmup_steps": _now("lr_scheduler.warmup_steps"),
    "training.warmup_pct": _none("set [lr_scheduler] warmup_steps to this share of the steps."),
    "training.compile": _now("compile.enable"),
    "training.seed": _now("debug.seed"),
    "training.deterministic": _now("debug.deterministic"),
    "training.debug_moe_force_load_balance": _now("debug.moe_force_load_balance"),
    "training.data_parallel_degree": _now("parallelism.data_parallel_shard_degree"),
    "training.sequence_parallel_degree": _now("parallelism.tensor_parallel_degree"),
    "training.data_parallel_type": _none(
        "torchtitan 0.2 and 0.3 shard by [parallelism] data_parallel_shard_degree, and replicate "
        "by data_parallel_replicate_degree.",
        unless=("fsdp",),
    ),
    "training.enable_loss_parallel": _opposite("parallelism.disable_loss_parallel"),
    "training.checkpoint_folder": _none(_CHECKPOINTS, unless=("",)),
    "training.checkpoint_interval": _now("checkpoint.interval"),
    "training.checkpoint_interval_type": _none(_SECONDS, unless=("steps",)),
    "training.fp8_linear": _FLOAT8,
    "training.enable_fp8_linear": _FLOAT8,
    "training.enable_float8_linear": _FLOAT8,
    **{
        f"training.{name}": _now(f"quantize.linear.float8.{now}")
        for name, now in {
            "enable_fsdp_fp8_all_gather": "enable_fsdp_float8_all_gather",
            "enable_fsdp_float8_all_gather": "enable_fsdp_float8_all_gather",
            "precompute_float8_dynamic_scale_for_fsdp": "precompute_float8_dynamic_scale_for_fsdp",
        }.items()
    },
    **{f"training.{name}": _now(f"parallelism.{name}") for name in _PARALLEL},
    **{f"experimental.{name}": _now(f"parallelism.{name}") for name in _PARALLEL},
    "experimental.pipeline_parallel_split_points": _none(_SPLIT_POINTS, unless=([],)),
    "experimental.pipeline_parallel_microbatches": _none(_MICROBATCHES),
    "experimental.pipeline_parallel_split_mode": _none(
        "torchtitan 0.2 and 0.3 split by hand alone. Leave it out.", unless=("manual",)
    ),
    "experimental.enable_compiled_autograd": _none(_COMPILED_AUTOGRAD, unless=(False,)),
    "parallelism.pipeline_parallel_split_points": _none(_SPLIT_POINTS, unless=([],)),
    "parallelism.pipeline_parallel_microbatches": _none(_MICROBATCHES),
    "parallelism.enable_compiled_autograd": _none(_COMPILED_AUTOGRAD, unless=(False,)),
    "checkpoint.enable_checkpoint": _now("checkpoint.enable"),
    "checkpoint.interval_type": _none(_SECONDS, unless=("steps",)),
    "checkpoint.model_weights_only": _now("checkpoint.last_save_model_only"),
    "checkpoint.last_save_model_weights_only": _now("checkpoint.last_save_model_only"),
    "checkpoint.initial_load_model_weights_only": _now("checkpoint.initial_load_model_only"),
    "checkpoint.last_save_in_safetensors_format": _now("checkpoint.last_save_in_hf"),
    "memory_estimation.enabled": _now("memory_estimation.enable"),
    "validation.enabled": _now("validation.enable"),
    "float8.enable_float8_linear": _FLOAT8,
    "float8.enable_fsdp_float8_all_gather": _now(
        "quantize.linear.float8.enable_fsdp_float8_all_gather"
    ),
    "float8.precompute_float8_dynamic_scale_for_fsdp": _now(
        "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp"
    ),
    "float8.recipe_name": _now("quantize.linear.float8.recipe_name"),
    "float8.filter_fqns": _now("quantize.linear.float8.filter_fqns"),
    "float8.emulate": _now("quantize.linear.float8.emulate"),
    "float8.moe_fqns_prototype": _now("quantize.grouped_mm.float8.fqns"),
    "float8.moe_fqns": OlderKey(
        note="torchtitan's own files had it, but what was read is moe_fqns_prototype.", is_idle=True
    ),
    **{
        f"float8.scaling_type_{tensor}": _none(_OF_FLOAT8, unless=("dynamic",))
        for tensor in ("input", "weight", "grad_output")
    },
    "float8.force_recompute_fp8_weight_in_bwd": _none(_OF_FLOAT8, unless=(False,)),
    "mx.recipe_name": _now("quantize.linear.mx.recipe_name"),
    "mx.filter_fqns": _now("quantize.linear.mx.filter_fqns"),
    "mx.moe_fqns_prototype": _now("quantize.grouped_mm.mx.fqns"),
    "mx.use_fp8_dim1_cast_triton_kernel": OlderKey(
        now="quantize.linear.mx.mxfp8_dim1_cast_kernel_choice",
        value=_switch("triton", "torch"),
        note='true is "triton", false is "torch"',
    ),
    "mx.mxfp8_dim1_cast_kernel_choice": _now("quantize.linear.mx.mxfp8_dim1_cast_kernel_choice"),
    # The names of September 2025 for linears and experts.
    **{
        f"quantize.dense.{kind}.{name}": _now(f"quantize.linear.{kind}.{name}")
        for kind, names in _OF_LINEARS.items()
        for name in names
    },
    **{
        f"quantize.moe.{kind}.fqns": _now(f"quantize.grouped_mm.{kind}.fqns")
        for kind in _OF_LINEARS
    },
    **{
        f"fault_tolerance.{name}": _none(_SEMI_SYNC)
        for name in (
            "fragment_sync_delay",
            "fragment_update_alpha",
            "module_fqns_per_model_fragment",
            "num_fragments",
            "should_quantize",
            "sync_steps",
        )
    },
}
"""``section.name`` -> what became of it."""

SECTIONS = frozenset(key.rpartition(".")[0] for key in OLDER_KEYS)
"""Sections that have such keys; some have nothing else."""


def successor(key: str, value: Any, keys: Keys) -> str:
    """Return a sentence, with a space before it, on what became of an older key; or nothing.

    Args:
        key: ``section.name``.
        value: what the file has there, which the successor may write otherwise.
        keys: which keys the host takes; a successor that it does not take is no help.
    """
    older = OLDER_KEYS.get(key)
    if older is None:
        return ""
    section, _, name = older.now.rpartition(".")
    row = keys.get(section, {}).get(name)
    if row is None or row.message:
        return f" It is a key of an older torchtitan: {row.message if row else older.note}"
    if name == key.rpartition(".")[2]:
        return f" It belongs in [{section}]."
    said = f" Since torchtitan 0.2 it is {older.place}"
    renewed = older.renewed(value)
    if older.value is None or renewed is None:
        return f"{said}, {older.note}." if older.note else f"{said}."
    return f"{said}: write {assignment(name, renewed).strip()}."
