"""Compute the learning rate that a job's schedule has at a step, without a model."""

from __future__ import annotations

import torch
from torchtitan.trainer import Trainer


def learning_rate(config: Trainer.Config, steps: int) -> float:
    """Return the learning rate of the step after ``steps`` steps, of the first parameters."""
    rate = config.optimizer.param_groups[0].optimizer_kwargs["lr"]
    # torch's schedules want an optimizer. This one has nothing to train.
    optimizer = torch.optim.SGD([torch.zeros(())], lr=rate)
    schedule = config.lr_scheduler.build(
        optimizers=[optimizer], training_steps=config.training.steps
    )
    # Asked directly, because the schedule itself would have to take all steps up to there.
    return rate * schedule.schedulers[0].lr_lambdas[0](steps)
