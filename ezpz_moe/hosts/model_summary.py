"""What a flavor's model is made of, whichever host builds it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSummary:
    """Dimensions and parameters, counted and not computed."""

    dim: int
    n_layers: int
    num_experts: int
    top_k: int
    expert_hidden_dim: int
    total: int
    active: int
    embedding: int  # the input matrix; the output matrix has the same size, unless they are tied
