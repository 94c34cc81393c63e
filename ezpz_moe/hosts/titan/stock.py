"""The host's own routed experts, which ``ezpz-moe bench`` measures the backends against.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import torch
from torchtitan.models.common.moe import GroupedExperts


def stock_experts(
    w1_EFD: torch.Tensor, w2_EDF: torch.Tensor, w3_EFD: torch.Tensor
) -> GroupedExperts:
    """The host's own experts with these weights: ``(x_RD, num_tokens_per_expert_E) -> y_RD``."""
    E, F, D = w1_EFD.shape
    with torch.device("meta"):
        experts = GroupedExperts(GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E))
    weights = {"w1_EFD": w1_EFD, "w2_EDF": w2_EDF, "w3_EFD": w3_EFD}
    experts.load_state_dict(weights, assign=True)
    return experts
