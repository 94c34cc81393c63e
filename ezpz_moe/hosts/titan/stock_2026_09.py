"""Make the host's own routed experts, the reference of ``ezpz-moe bench``.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

import torch
from torchtitan.models.common.linear import GroupedLinear
from torchtitan.models.common.moe import RoutedExperts
from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher


class _StockExperts(torch.nn.Module):
    """The part of the host's ``RoutedExperts`` between dispatching and combining tokens."""

    def __init__(self, experts: RoutedExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        offsets_E = torch.cumsum(num_tokens_per_expert_E, dim=0, dtype=torch.int32)
        # As in the host's forward, which has no part of its own for this: it also dispatches and
        # combines.
        gate_RF, up_RF = self.experts.w13(x_RD.bfloat16(), offsets_E).unbind(dim=-2)
        hidden_RF = self.experts.activation_fn(gate_RF, up_RF, offsets=offsets_E)
        return self.experts.w2(hidden_RF, offsets_E).type_as(x_RD)


def stock_experts(
    w1_EFD: torch.Tensor, w2_EDF: torch.Tensor, w3_EFD: torch.Tensor
) -> torch.nn.Module:
    """Return the host's own experts: ``(x_RD, num_tokens_per_expert_E) -> y_RD``."""
    E, F, D = w1_EFD.shape
    linear = GroupedLinear.Config
    with torch.device("meta"):
        experts = RoutedExperts(
            RoutedExperts.Config(
                w13=linear(group_size=E, in_features=D, out_features=F, num_linears=2),
                w2=linear(group_size=E, in_features=F, out_features=D),
                token_dispatcher=LocalTokenDispatcher.Config(num_experts=E, top_k=1),
            )
        )
    # Gate first, as the host orders them.
    w13_E2FD = torch.stack([w1_EFD, w3_EFD], dim=1)
    experts.load_state_dict({"w13.weight": w13_E2FD, "w2.weight": w2_EDF}, assign=True)
    return _StockExperts(experts)
