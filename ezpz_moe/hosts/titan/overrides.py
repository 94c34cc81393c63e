"""Give door 2 what it needs from torchtitan: targets, and the job that an override belongs to.

The host passes an override one node of the config, and offers no way to the job that the node
belongs to. The job is therefore looked up in the host's functions that are applying the override:
a parameter there is called ``config_root``. If a host renames it, no job is found, and door 2 does
without its checks, hints and the lock of the run's folder. ``ezpz-moe doctor`` says so.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import BaseAttention
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavor_schema import ExpertPrecision, Routed
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.cpu import sum_reduction_on_gloo
from ezpz_moe.hosts.precision import door_2_line, trains_in_float32
from ezpz_moe.hosts.ranks import is_dry_run
from ezpz_moe.hosts.titan.activation_checkpointing import products_kept
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.checkpointer import Checkpointer
from ezpz_moe.hosts.titan.conflicts import captures_cuda_graphs, is_about_to_train
from ezpz_moe.hosts.titan.dispatchers import refuse_dispatcher_of_config
from ezpz_moe.hosts.titan.initial_values import refuse_twins
from ezpz_moe.hosts.titan.override_conflicts import (
    is_inside,
    named,
    refuse_overrides,
    refuse_without_effect,
    replaced_nodes,
)

_CHECKPOINTER = "ezpz_moe.overrides.checkpointer"
_EXPERTS = "ezpz_moe.overrides.experts"
_OVERRIDDEN_IN_PART = "another override replaces a part of it"

_target_of: dict[str, type] = {}
"""Our overrides by the name that a user writes -> the class of the config's nodes they replace."""

_wrappers_of: dict[Callable[..., Any], tuple[Callable[..., Any], ...]] = {}
"""What parallelizes a model here, and by what we have wrapped it."""


def for_experts(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``factory`` as an override of the routed experts, and return it."""
    return _registered(
        factory,
        _experts_to_replace(),
        "Compute the routed experts with a backend of ezpz_moe.",
    )


def for_attention(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``factory`` as an override of the attention, and return it."""
    return _registered(
        factory,
        BaseAttention.Config,
        "Causal SDPA in place of FlexAttention or varlen attention.",
    )


def for_checkpoints(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``factory`` as an override of the checkpoint manager, and return it."""
    return _registered(
        factory,
        CheckpointManager.Config,
        "Save on SIGTERM, and resume as the jobs of ezpz_moe do.",
    )


def selected(
    config: Any,
    backend: str,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
    routed: Routed = "one_node",
) -> Any:
    """Return the config of the same routed layer, with experts computed by ``backend``.

    Args:
        config: of the layer; of its experts alone, if another override replaces a part of it.

    Raises:
        EzpzError: unknown backend, or it cannot compute these experts.
    """
    experts = titan().experts()
    choice = (config, backend, chosen_by, expert_precision)
    if isinstance(config, experts.HostLayer.Config):
        selected = experts.selected_layer(*choice, routed)
    else:
        selected = experts.selected(*choice, why_composed=_OVERRIDDEN_IN_PART)
    if (job := _job_being_overridden()) is not None:
        _wrap_parallelize_fn(job, products_kept)
    return selected


def causal_attention(config: Any) -> Any:
    """Return the config of the SDPA kernel that replaces ``config.inner_attention``."""
    return titan().causal_attention(config)


def our_checkpointer(config: Any) -> Any:
    """Return the config of the plugin's checkpoint manager, with the settings of ``config``."""
    return derive(config, Checkpointer.Config)


def turn_off_cuda_graphs_for(backend: str) -> None:
    """Turn CUDA graphs off: they are on by default and cannot capture a backend with host syncs.

    If no job is found, the backend itself refuses to be captured, and names the same remedy.
    """
    job = _job_being_overridden()
    if job is not None and get_backend(backend).host_syncs and captures_cuda_graphs(job):
        # In place: the host looks at this very object after the overrides, before it captures.
        job.training.disable_cuda_graphs = True
        logger.warning(
            f"ezpz_moe: turned CUDA graphs off (training.disable_cuda_graphs), because "
            f"compute_backend {backend} copies token counts to the host"
        )


def refuse_overrides_of_job() -> None:
    """Refuse overrides that exclude each other or do nothing; pass if no job is found.

    Refuse a token dispatcher that this machine cannot run, too: the host would build the model
    first. What its settings exclude, the host has refused by now.

    Raises:
        EzpzError: one is named twice, or two replace the routed experts; one of ours does not
            exist, or there is nothing in the job that it replaces; the dispatcher cannot run here.
    """
    job = _job_being_overridden()
    if job is None:
        return
    refuse_overrides(job)
    refuse_without_effect(job, _target_of)
    if is_about_to_train() and not is_dry_run(job):
        refuse_dispatcher_of_config(job)


def enter_run(door: str) -> None:
    """Refuse a run that must not start, lock its folder, and let FSDP train it on the CPU.

    It does nothing if no job is found.

    Raises:
        EzpzError: several CPU ranks would start alike, or another run writes into the folder.
    """
    job = _job_being_overridden()
    if job is None:
        return
    refuse_twins(job, f"--override.imports {door}")
    # The model is built after the overrides, and so is whatever writes into the folder.
    run_folder.hold_for(job, job.dump_folder)
    _wrap_parallelize_fn(job, sum_reduction_on_gloo)
    if _is_stopped_without_saving(job):
        _warn_once(
            "ezpz_moe: SIGTERM will end this run without saving the step that it is at. To have it "
            f"saved, add {_CHECKPOINTER} to --override.imports"
        )


def warn_of_emulation() -> None:
    """Say once how to train in the CPU's own precision: we may not change a job's settings."""
    job = _job_being_overridden()
    if job is not None and trains_in_float32(utils.device_type):
        line = door_2_line(job.training.mixed_precision_param)
        if line is not None:
            _warn_once(line)


def _wrap_parallelize_fn(
    job: Trainer.Config, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    spec = job.model_spec
    wrappers = _wrappers_of.get(spec.parallelize_fn, ())
    # Once: we are called for every layer.
    if wrapper not in wrappers:
        # In place, as above: the host takes it from this very object.
        spec.parallelize_fn = wrapper(spec.parallelize_fn)
        _wrappers_of[spec.parallelize_fn] = (*wrappers, wrapper)


def _experts_to_replace() -> type:
    """Return the host's class of a routed layer's config, or of its experts' alone.

    The host refuses overrides of nodes in one another. Beside one of a layer's dispatcher, for
    example, ours replaces the experts, and the layer stays composed.
    """
    experts = titan().experts()
    layer = experts.HostLayer.Config
    if (job := _job_being_overridden()) is None:
        return layer
    layers = {name for name, *_ in job.traverse(layer)}
    others = [nodes for name, nodes in replaced_nodes(job).items() if name != _EXPERTS]
    is_in_part = any(is_inside(node, layers) for nodes in others for node in nodes)
    return experts.HostExperts.Config if is_in_part else layer


def _is_stopped_without_saving(job: Trainer.Config) -> bool:
    checkpoint = job.checkpoint
    # By name too: the override of the checkpointer may come later than the one that asks.
    is_ours = isinstance(checkpoint, Checkpointer.Config) or _CHECKPOINTER in named(job)
    # Of another manager than the host's usual one we have no kind that saves.
    is_usual = isinstance(checkpoint, CheckpointManager.Config)
    saves = run_folder.saves_checkpoints(job) and not is_dry_run(job)
    return saves and is_usual and not is_ours


def _registered(factory: Callable[..., Any], target: type, about: str) -> Callable[..., Any]:
    _target_of[f"{factory.__module__}.{factory.__name__}"] = target
    return override(target=target, description=about)(factory)


# An override is called once per MoE layer.
@cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def _job_being_overridden() -> Trainer.Config | None:
    # An override cannot claim the root itself: the host refuses to replace it in place.
    # context=0 reads no source files; the default would, for every frame of every layer's override.
    for caller in inspect.stack(context=0):
        root = caller.frame.f_locals.get("config_root")
        if isinstance(root, Trainer.Config):
            return root
    return None
