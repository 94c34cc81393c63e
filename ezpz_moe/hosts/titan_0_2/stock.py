"""Make the host's own routed experts, the reference of ``ezpz-moe bench``.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import torch
from torchtitan.models.moe.moe import GroupedExperts


def stock_experts(
    w1_EFD: torch.Tensor, w2_EDF: torch.Tensor, w3_EFD: torch.Tensor
) -> GroupedExperts:
    """Return the host's own experts: ``(x_RD, num_tokens_per_expert_E) -> y_RD``.

    They use torch._grouped_mm, for which the host pads tokens with a Triton kernel. On the CPU that
    cannot run, and they use the host's for-loop.
    """
    E, F, D = w1_EFD.shape
    # Meta device and assign=True: the module takes over the given tensors, without a second copy.
    with torch.device("meta"):
        experts = GroupedExperts(D, F, E, use_grouped_mm=w1_EFD.device.type != "cpu")
    experts.load_state_dict({"w1": w1_EFD, "w2": w2_EDF, "w3": w3_EFD}, assign=True)
    return experts
