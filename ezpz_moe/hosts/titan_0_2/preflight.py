"""Build one rank of a big run on this machine, with the host's own trainer."""

from __future__ import annotations

import sys

import torch
from torchtitan.config import ConfigManager
from torchtitan.distributed.utils import init_distributed
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.train import Trainer

from ezpz_moe.config.job import find_job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dry_run import FAKE_COMMUNICATION, become_rank, parallelized, report
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.hosts.titan_0_2.command import arguments
from ezpz_moe.hosts.titan_0_2.job_keys import KEYS

_STEP = "not run: the router counts tokens, which have no value"


def run_rank(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """Build ``rank`` of ``world_size`` and measure it. Once per process: the host has global state.

    Raises:
        whatever the rank would have raised.
    """
    become_rank(rank, world_size)
    sys.argv[1:] = [*arguments(find_job(config, KEYS)), *host_flags, *FAKE_COMMUNICATION]
    job_config = ConfigManager().parse_args(sys.argv[1:])  # `job_config` in job.py reads sys.argv
    has_pipeline = job_config.parallelism.pipeline_parallel_degree > 1
    # Rank 0 is left to the host: 0.2.1 can build that one, too.
    if rank:
        _join_as(rank, world_size)
    spec = get_train_spec(job_config.model.name)
    parts = parallelized(lambda: Trainer(job_config), spec, has_pipeline=has_pipeline)
    return report(rank, parts, _STEP)


def _join_as(rank: int, world_size: int) -> None:
    """Join a fake group as ``rank``: the host's own is always rank 0, but 0.2.2 accepts another."""
    # 0.2.1 does not look whether a group exists. What its code calls tells them apart; versions of
    # checkouts do not.
    if "is_initialized" not in init_distributed.__code__.co_names:
        raise EzpzError(
            "torchtitan 0.2.1 can fake only rank 0, so only the first pipeline stage can be built. "
            "Use torchtitan 0.2.2."
        )
    torch.distributed.init_process_group("fake", rank=rank, world_size=world_size)
