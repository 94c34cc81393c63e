"""What two checkpoints route differently: OpenMoE, arXiv 2402.01739, section 4.

Legend of the suffixes: T = tokens, K = experts of a token, E = experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ezpz_moe.tools.analysis.tokens import multi_hot


@dataclass(frozen=True)
class Drift:
    """How the routing of the same tokens differs.

    Attributes:
        changed: share of the tokens with a different set of experts.
        jaccard: mean over the tokens of |both sets| / |either set|; 1 if nothing changed.
    """

    changed: float
    jaccard: float


def drift(ids_TK: torch.Tensor, others_TK: torch.Tensor, num_experts: int) -> Drift:
    """Compare the experts of each token as sets, because their order means nothing.

    Args:
        ids_TK, others_TK: the chosen experts of both, none twice for a token; E is none of
            them; K may differ.
        num_experts: E of both.
    """
    chosen_TE, others_TE = (multi_hot(ids, num_experts).bool() for ids in (ids_TK, others_TK))
    both_T, either_T = (chosen_TE & others_TE).sum(1), (chosen_TE | others_TE).sum(1)
    return Drift(
        # Two sets differ if one of them has an expert that the other lacks.
        changed=(both_T < either_T).double().mean().item(),
        # Two empty sets are the same.
        jaccard=torch.where(either_T > 0, both_T.double() / either_T, 1).mean().item(),
    )
