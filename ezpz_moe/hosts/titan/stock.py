"""Make the host's own routed experts, the reference of ``ezpz-moe bench``.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import torch
from torchtitan.models.common.moe import GroupedExperts


def stock_experts(
    w1_EFD: torch.Tensor, w2_EDF: torch.Tensor, w3_EFD: torch.Tensor
) -> GroupedExperts:
    """Return the host's own experts: ``(x_RD, num_tokens_per_expert_E) -> y_RD``."""
    E, F, D = w1_EFD.shape
    # Meta device and assign=True: the module takes over the given tensors. A second copy of the
    # weights could exceed the device's memory.
    with torch.device("meta"):
        experts = GroupedExperts(GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E))
    weights = {"w1_EFD": w1_EFD, "w2_EDF": w2_EDF, "w3_EFD": w3_EFD}
    experts.load_state_dict(weights, assign=True)
    return experts
