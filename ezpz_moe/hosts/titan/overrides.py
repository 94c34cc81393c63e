"""What door 2 needs of torchtitan 0.3: targets, and the job that an override belongs to."""

import inspect
from functools import cache

from torchtitan.config.override import override
from torchtitan.models.common.attention import BaseAttention
from torchtitan.tools import utils
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from ezpz_moe.compute import get_backend
from ezpz_moe.hosts import binding
from ezpz_moe.hosts.precision import door_2_line, trains_in_float32
from ezpz_moe.hosts.titan_0_3.conflicts import captures_cuda_graphs
from ezpz_moe.hosts.titan_0_3.initial_values import refuse_twins

for_experts = override(
    target=binding("experts").HostExperts.Config,
    description="Compute the routed experts with a backend of ezpz_moe.",
)
for_attention = override(
    target=BaseAttention.Config,
    description="Causal SDPA in place of FlexAttention or varlen attention.",
)


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
