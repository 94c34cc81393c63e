"""Validate without counting for training: torchtitan 0.2 counts validation's tokens as well."""

from __future__ import annotations

from torch import nn
from torchtitan.components.validate import Validator
from torchtitan.models.moe import MoE


class UncountedValidator(Validator):
    """The host's validator, after which the biases' counters are as they were before.

    The host updates each expert's bias from the tokens that it got since the last step. It counts
    them in every forward, so a validation would change what the model learns.
    """

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Validate as the host does, and undo the counting."""
        layers = [each for part in model_parts for each in part.modules() if isinstance(each, MoE)]
        before = [moe.tokens_per_expert.clone() for moe in layers]
        super().validate(model_parts, step)
        for moe, counts_E in zip(layers, before, strict=True):
            moe.tokens_per_expert.copy_(counts_E)
