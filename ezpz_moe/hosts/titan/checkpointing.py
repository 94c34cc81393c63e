"""Full activation checkpointing under which a token goes the same way twice.

A recomputed score may differ in its last bit from the first one: kernels of another fusion, sums in
another order. A token on the edge of a tie then would go to another expert in backward than in
forward, with gradients of something that was never computed, or with expert parallelism a crash.
The host's selective checkpointing saves what topk chose, for this reason; here its full one does
too, at K int64 a token and layer.
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
    """``FullAC`` that recomputes everything but the router's choices."""

    @dataclass(kw_only=True, slots=True)
    class Config(FullAC.Config):
        pass

    def _wrap_block(
        self, module: torch.nn.Module, *, base_fqn: str | None = None
    ) -> torch.nn.Module:
        return checkpoint_wrapper(
            module,
            context_fn=functools.partial(create_selective_checkpoint_contexts, _CHOICES),
            preserve_rng_state=self.config.preserve_rng_state,
            determinism_check=self.config.determinism_check,
            early_stop=False,
            debug=self.config.debug,
        )


def keeping_choices(policy: Any) -> Any:
    """The same policy, with the choices kept where the host's own would make them again."""
    if type(policy) is FullAC.Config:
        return derive(policy, FullACKeepingChoices.Config)
    return policy
