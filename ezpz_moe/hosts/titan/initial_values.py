"""Make a job's model start on several CPU ranks with the values of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchtitan.config.override import derive
from torchtitan.protocols.model import BaseModel
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.initial_values import (
    has_several_ranks,
    initialize_as_one_rank,
    whole_model,
)
from ezpz_moe.hosts.titan.mixed import mixed


class _Root(BaseModel):
    """Mixin before a model's class. The trainer's ``init_weights`` is ``init_states``."""

    def __init__(self, config: Any):
        super().__init__(config)
        # Here the model is complete, on the meta device, and not yet cut by a pipeline or FSDP.
        self._whole = whole_model(self)

    def init_states(self, *, buffer_device: torch.device | None = None) -> None:
        with exit_on_user_error():
            initialize_as_one_rank(self, self._whole, _as_the_host_does, buffer_device)


def _as_the_host_does(model: Any, buffer_device: torch.device | None) -> None:
    # Past our own init_states, which is what calls this.
    super(_Root, model).init_states(buffer_device=buffer_device)


def starting_as_one_rank(model: BaseModel.Config) -> BaseModel.Config:
    """Return the config of the same model with initial values that do not depend on the CPU ranks.

    No name, shape or one-rank value of a parameter changes.
    """
    return derive(model, mixed(type(model)._owner, _Root).Config)


def refuse_twins(config: Trainer.Config, door: str) -> None:
    """Refuse a fresh start on several CPU ranks if the model's root class is not ours.

    Args:
        config: what is about to be trained.
        door: how we got into the run, for the message.

    Raises:
        EzpzError: every rank would draw the same values for its part of the model.
    """
    # With offloading the host makes weights on the CPU, whatever it trains on.
    on_cpu = utils.device_type == "cpu" or config.training.enable_cpu_offload
    ours = issubclass(type(config.model_spec.model)._owner, _Root)
    if ours or not (on_cpu and has_several_ranks()) or _loads_checkpoint(config):
        return
    raise EzpzError(
        f"{door}: this run starts from scratch on several ranks whose weights are made on the CPU. "
        "There torch draws the same values for every rank's part, so every expert would have a "
        "twin, and an override cannot fix that. Start from a checkpoint: run the same command "
        "once with one rank, `--checkpoint.enable --checkpoint.create-seed-checkpoint` and no "
        "parallelism, then with `--checkpoint.enable`. Or train a flavor (`--module ezpz_moe`), "
        "which starts correctly."
    )


def _loads_checkpoint(config: Trainer.Config) -> bool:
    checkpoint = config.checkpoint
    if not checkpoint.enable:
        return False
    # Either one replaces the fresh values: a checkpoint that is named, or one in the run's own
    # folder to resume from.
    own = Path(config.dump_folder, checkpoint.folder)
    named = checkpoint.initial_load_path or checkpoint.initial_load_in_hf
    return bool(named) or bool(run_folder.steps(own))
