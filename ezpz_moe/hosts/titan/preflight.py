"""Build one rank of a big run on this machine, with the host's own trainer."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torchtitan.config import ConfigManager
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.hosts.dry_run import FAKE_COMMUNICATION, become_rank, parallelized, report
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.hosts.titan.attention import has_masked_attention
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.command import named
from ezpz_moe.hosts.titan.labelled import all_counted

_FAILED = (
    "{}: {} (in a step with tensors that have shapes but no values; the rank itself was built, and "
    "a step with values may not hit this)"
)


def run_rank(config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    """Build ``rank`` of ``world_size`` and measure it. Once per process: the host has global state.

    A failed step is reported beside the measurements: this function runs it, not the trainer.

    Raises:
        whatever the rank would have raised until its model was parallelized.
    """
    trainer_config = config_of_rank(config, host_flags, world_size, rank)
    parts = parts_of_model(trainer_config)
    built = report(rank, parts)  # before the step: where it stops, it leaves shards gathered
    if reason := _why_no_step(trainer_config):
        return replace(built, step=f"not run: {reason}")
    (model,) = parts
    try:
        return replace(built, step=_step(trainer_config, model))
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        return replace(built, step=f"not run: {error} reads values, which the tensors do not have")
    # Anything: a kernel may not know tensors without values. What was measured is still right.
    except Exception as error:
        return replace(built, step="failed", error=_FAILED.format(type(error).__name__, error))


def config_of_rank(
    config: str, host_flags: list[str], world_size: int, rank: int
) -> Trainer.Config:
    """Return the trainer's config, with this process as ``rank`` of ``world_size``."""
    become_rank(rank, world_size)
    # The user's flags come last: nothing may follow a subcommand such as
    # activation-checkpoint:full.
    return ConfigManager().parse_args([*named(config), *FAKE_COMMUNICATION, *host_flags])


def parts_of_model(config: Trainer.Config) -> list[nn.Module]:
    """Return the model's parts on this rank, parallelized, on the meta device."""
    has_pipeline = config.parallelism.pipeline_parallel_degree > 1
    return parallelized(config.build, config.model_spec, has_pipeline=has_pipeline)


def _why_no_step(config: Trainer.Config) -> str:
    """Return why a step needs other ranks or values; empty if it does not."""
    if config.parallelism.pipeline_parallel_degree > 1:
        return "a pipeline stage needs its neighbours"
    if config.parallelism.expert_parallel_degree > 1:
        return "the dispatch of expert parallelism reads token counts, which have no values"
    if config.parallelism.context_parallel_degree > 1:
        return "context parallelism splits the sequence before the model gets it"
    return ""


def _step(config: Trainer.Config, model: Any) -> str:
    """Run forward and backward with tensors that have no values, as far as the device can.

    What the host compiles runs eagerly: a compiler would be given tensors of its own kind.
    """
    shape = titan().one_sequence(attrgetter(titan().LENGTH)(config))
    is_masked = has_masked_attention(config.model_spec)
    # FlexAttention and varlen attention have none on the CPU, but their forward still finds
    # mistakes.
    has_backward = not (is_masked and utils.device_type == "cpu")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.compiler.set_stance("force_eager"),
        torch.set_grad_enabled(has_backward),
    ):
        model.to_empty(device=utils.device_type)
        tokens, positions = torch.zeros((2, *shape), dtype=torch.int64, device=utils.device_type)
        inputs = {"positions": positions, **all_counted(config.dataloader, tokens)}
        if is_masked:
            inputs["attention_masks"] = model.get_attention_masks(positions=positions)
        output = model(tokens, **inputs)
        if not has_backward:
            return "forward; its attention has no backward on the CPU"
        # Any scalar will do: only shapes are checked, and the host's loss is not part of the model.
        output.sum().backward()
    return "forward and backward"
