"""One rank of a big run, built on this machine: the host's own trainer up to its parallelisms.

The host's fake communication makes one process believe that it is a rank among many, and its model
stays on the meta device until it has been parallelized. The two functions of ``ModelSpec`` that
parallelize are the door: they are called inside the trainer, after meshes, overrides and model are
built, and here they end the run when they return. Nothing of the trainer is repeated, so that a
mistake shows as the error that the rank would have met.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torchtitan.config import ConfigManager
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.preflight import RankReport

_STATES_PER_PARAMETER = 4  # weight, gradient and AdamW's two moments, all in the weight's dtype
_TOKENS = 16


def run_rank(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """Build ``rank`` of ``world_size`` and measure it. Once per process: the host has global state.

    Raises:
        whatever the rank would have met.
    """
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world_size), "NGPU": str(world_size)}
    arguments = ["--module", "ezpz_moe", "--config", config, *host_flags]
    trainer_config = ConfigManager().parse_args([*arguments, "--comm.mode", "fake_backend"])
    parts = _parallelized(trainer_config)
    parameters = [_local(p) for part in parts for p in part.parameters()]
    return RankReport(
        rank=rank,
        parameters=sum(p.numel() for p in parameters),
        state_bytes=_STATES_PER_PARAMETER * sum(p.numel() * p.itemsize for p in parameters),
        step=_step(trainer_config, parts),
    )


class _Parallelized(BaseException):
    """Ends the trainer's construction. No Exception, so that nothing on the way handles it."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts


def _parallelized(config: Trainer.Config) -> list[nn.Module]:
    """The model's parts on this rank, on the meta device."""
    spec = config.model_spec
    if config.parallelism.pipeline_parallel_degree > 1:
        spec.pipelining_fn = _ending_with(lambda stages: stages[1], spec.pipelining_fn)
    else:
        spec.parallelize_fn = _ending_with(lambda model: [model], spec.parallelize_fn)
    try:
        config.build()
    except _Parallelized as end:
        return end.parts
    raise AssertionError("the trainer was built without parallelizing its model")


def _ending_with(
    parts_of: Callable[[Any], list[nn.Module]], parallelize: Callable[..., Any] | None
) -> Callable[..., Any]:
    assert parallelize is not None

    def parallelize_and_end(*args: Any, **kwargs: Any) -> None:
        raise _Parallelized(parts_of(parallelize(*args, **kwargs)))

    return parallelize_and_end


def _local(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _step(config: Trainer.Config, parts: list[nn.Module]) -> str:
    """Forward and backward with tensors that have shapes and no values, where the host can."""
    if config.parallelism.pipeline_parallel_degree > 1:
        return "not run: a pipeline stage needs its neighbours"
    if config.parallelism.expert_parallel_degree > 1:
        return "not run: the dispatch of expert parallelism reads token counts, which have no value"
    (model,) = parts
    degree = config.parallelism.tensor_parallel_degree * config.parallelism.context_parallel_degree
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=utils.device_type)
        tokens_BL = torch.zeros(1, _TOKENS * degree, dtype=torch.int64, device=utils.device_type)
        model(tokens_BL).sum().backward()
    return "forward and backward"
