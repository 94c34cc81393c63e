"""One rank of a big run, built on this machine by the host's own trainer."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtitan.config import ConfigManager
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.hosts import binding
from ezpz_moe.hosts.dry_run import FAKE_COMMUNICATION, become_rank, parallelized, report
from ezpz_moe.preflight import RankReport


def run_rank(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """Build ``rank`` of ``world_size`` and measure it. Once per process: the host has global state.

    Raises:
        whatever the rank would have met.
    """
    become_rank(rank, world_size)
    arguments = ["--module", "ezpz_moe", "--config", config, *host_flags, *FAKE_COMMUNICATION]
    trainer_config = ConfigManager().parse_args(arguments)
    has_pipeline = trainer_config.parallelism.pipeline_parallel_degree > 1
    spec = trainer_config.model_spec
    parts = parallelized(trainer_config.build, spec, has_pipeline=has_pipeline)
    return report(rank, parts, _step(trainer_config, parts))


def _step(config: Trainer.Config, parts: list[nn.Module]) -> str:
    """Forward and backward with tensors that have shapes and no values, where the host can."""
    if config.parallelism.pipeline_parallel_degree > 1:
        return "not run: a pipeline stage needs its neighbours"
    if config.parallelism.expert_parallel_degree > 1:
        return "not run: the dispatch of expert parallelism reads token counts, which have no value"
    (model,) = parts
    dialect = binding("dialect")
    shape = dialect.one_sequence(attrgetter(dialect.LENGTH)(config))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=utils.device_type)
        model(torch.zeros(shape, dtype=torch.int64, device=utils.device_type)).sum().backward()
    return "forward and backward"
