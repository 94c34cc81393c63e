"""Describe what a flavor's model consists of. The same for all hosts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSummary:
    """Dimensions and parameters, counted on the model instead of computed from a formula.

    A tuple has each layer's number, where layers with experts differ.
    """

    dim: int
    n_layers: int
    num_experts: int | tuple[int, ...]
    top_k: int | tuple[int, ...]
    expert_hidden_dim: int | tuple[int, ...]
    total: int
    active: int
    embedding: int  # the input matrix; the output matrix has the same size, unless they are tied
