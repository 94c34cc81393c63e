"""Compute the learning rate that a job's schedule has at a step, without a model."""

from __future__ import annotations

from typing import Any

import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers


def learning_rate(config: Any, steps: int) -> float:
    """Return the learning rate of the step after ``steps`` steps."""
    # torch's schedules want an optimizer. This one has nothing to train.
    optimizer = torch.optim.SGD([torch.zeros(())], lr=config.optimizer.lr)
    schedule = build_lr_schedulers([optimizer], config.lr_scheduler, config.training.steps)
    # Asked directly, because the schedule itself would have to take all steps up to there.
    return config.optimizer.lr * schedule.schedulers[0].lr_lambdas[0](steps)
