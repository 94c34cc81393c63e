"""Keep a token's experts the same when full activation checkpointing recomputes a layer.

A recomputed score can differ from the first in its last bit, because kernels may be fused or sums
ordered differently. A token close to a tie would then go to another expert in backward than in
forward. Its gradients would belong to something that was never computed, and with expert
parallelism the run could crash. For this reason the host's selective checkpointing saves what topk
chose. Here its full checkpointing does the same, which costs K int64 per token and layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torchtitan.config.override import derive
from torchtitan.distributed.activation_checkpoint import FullAC

_CHOICES = [torch.ops.aten.topk.default]


class FullACKeepingChoices(FullAC):
    """``FullAC`` that recomputes everything except the router's choices."""

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        pass

    def _wrap_block(
        self, module: torch.nn.Module, *, base_fqn: str | None = None
    ) -> torch.nn.Module:
        # The host's own call plus context_fn: the host has no hook that would add only that.
        return checkpoint_wrapper(
            module,
            context_fn=functools.partial(create_selective_checkpoint_contexts, _CHOICES),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            # The host's own value, which its config has no field for.
            early_stop=False,
            debug=self.config.debug,
        )


def keeping_choices(policy: Any) -> Any:
    """Return the policy with the choices kept, if the host's own would make them again."""
    # Not isinstance: a subclass wraps blocks in its own way, which we must not drop.
    if type(policy) is FullAC.Config:
        return derive(policy, FullACKeepingChoices.Config)
    return policy
