"""Let torch.compile build a program for every kind of layer."""

from __future__ import annotations

import torch

from ezpz_moe.config.flavor_schema import Dimensions

_PROGRAMS = 4
"""Of one kind of layer: in training and in validation, with and without gradients."""


def make_room(size: Dimensions) -> None:
    """Raise torch's limit of programs for one function to what the layers' sizes need.

    The host compiles layer by layer, and all layers are calls of one function. Beyond the limit,
    which is 8 by default, it ends the run. Nothing changes for layers of one size.
    """
    if not size.is_uneven:
        return
    kinds = len(set(size.layer_sizes.values())) + 1  # and dense ones
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _PROGRAMS * kinds)
    limits.accumulated_recompile_limit = max(
        limits.accumulated_recompile_limit, _PROGRAMS * limits.recompile_limit
    )
