"""What door 2 needs of torchtitan: targets, and the job that an override belongs to."""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torchtitan.config.override import override
from torchtitan.models.common.attention import BaseAttention
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavor_schema import ExpertPrecision
from ezpz_moe.hosts.precision import door_2_line, trains_in_float32
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.conflicts import captures_cuda_graphs
from ezpz_moe.hosts.titan.initial_values import refuse_twins


def for_experts(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``factory`` as an override of the routed experts; ``factory`` itself."""
    return override(
        target=titan().experts().HostExperts.Config,
        description="Compute the routed experts with a backend of ezpz_moe.",
    )(factory)


def for_attention(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Register ``factory`` as an override of the attention; ``factory`` itself."""
    return override(
        target=BaseAttention.Config,
        description="Causal SDPA in place of FlexAttention or varlen attention.",
    )(factory)


def selected(
    config: Any, backend: str, chosen_by: str, expert_precision: ExpertPrecision | None = None
) -> Any:
    """The config of the same experts, computed by ``backend``.

    Raises:
        EzpzError: unknown backend, or these experts cannot be computed by it.
    """
    return titan().experts().selected(config, backend, chosen_by, expert_precision)


def causal_attention(config: Any) -> Any:
    """The config of the SDPA kernel that stands in for ``config.inner_attention``."""
    return titan().causal_attention(config)


def turn_off_cuda_graphs_for(backend: str) -> None:
    """CUDA graphs are on by default and cannot capture a backend with host syncs.

    The host hands an override one node and not the job, and asks nothing of it later. So the
    job is taken from the host function that calls the override; where that is not found, the
    backend itself refuses to be captured, with the same remedy.
    """
    job = _job_being_overridden()
    if job is not None and get_backend(backend).host_syncs and captures_cuda_graphs(job):
        job.training.disable_cuda_graphs = True
        logger.warning(
            f"ezpz_moe: turned CUDA graphs off (training.disable_cuda_graphs), because "
            f"compute_backend {backend} copies token counts to the host"
        )


def refuse_twins_of(door: str) -> None:
    """Refuse a run whose several CPU ranks would begin alike; where no job is found, do nothing.

    Raises:
        EzpzError: it would.
    """
    job = _job_being_overridden()
    if job is not None:
        refuse_twins(job, f"--override.imports {door}")


def warn_of_emulation() -> None:
    """Say once how to train in the CPU's own precision: a job's settings are not ours to change."""
    job = _job_being_overridden()
    if job is not None and trains_in_float32(utils.device_type):
        line = door_2_line(job.training.mixed_precision_param)
        if line is not None:
            _warn_once(line)


@cache
def _warn_once(line: str) -> None:
    logger.warning(line)


def _job_being_overridden() -> Trainer.Config | None:
    for caller in inspect.stack(context=0):
        root = caller.frame.f_locals.get("config_root")
        if isinstance(root, Trainer.Config):
            return root
    return None
