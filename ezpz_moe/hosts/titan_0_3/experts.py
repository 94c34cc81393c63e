"""Routed experts of torchtitan 0.3 with a selectable backend.

``EzpzGroupedExperts`` replaces the host's ``GroupedExperts``: it hands the whole SwiGLU FFN to the
backend. Every other experts class of the host (gpt_oss, with its biases and clamped SwiGLU) gets
the selector through a subclass made for it, as the host's quantization converters do, and only
its ``_grouped_mm`` seam is replaced. No parameter changes its name, shape, initial value or
state-dict key, so that a checkpoint of one backend is a checkpoint of all.

The host casts experts' inputs and weights to bfloat16; so does this binding.
Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts

from ezpz_moe.hosts.titan_0_3.selector import (
    HOST_PATH,
    ExpertComputeBackend,
    Selector,
    Sizes,
    check_seam,
    selectable,
    with_selector,
)

HostExperts = GroupedExperts
"""The host's class whose config nodes get the selector."""


class EzpzGroupedExperts(Selector, GroupedExperts):
    """``GroupedExperts`` whose expert FFN is computed by ``config.compute_backend``."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        compute_backend: ExpertComputeBackend = HOST_PATH
        chosen_by: str = "default"
        """Who asked for the backend; for the log."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._choose(config)

    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        """Expert FFN of the rows routed to the local experts.

        Args:
            x_RD: rows sorted by expert, possibly with tail rows.
            num_tokens_per_expert_E: integer counts of the local experts.

        Returns:
            y_RD in x's dtype. Device syncs: those of the backend.
        """
        if self._backend is None:
            return super().forward(x_RD, num_tokens_per_expert_E)
        self._count(x_RD, num_tokens_per_expert_E)
        w1_EFD, w2_EDF, w3_EFD = map(_local_bf16, (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        y_RD = self._backend.swiglu(
            w1_EFD, w2_EDF, w3_EFD, x_RD.bfloat16(), num_tokens_per_expert_E
        )
        return y_RD.type_as(x_RD)


class _SeamSelector(Selector):
    """For every other experts class: its ``_grouped_mm`` seam alone is replaced."""

    # The host looks up the shardings of inputs by the names of its own parameters.
    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        self._count(x_RD, num_tokens_per_expert_E)
        return super().forward(x_RD, num_tokens_per_expert_E)

    def _grouped_mm(
        self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor
    ) -> torch.Tensor:
        if self._backend is None:
            return super()._grouped_mm(A=A, B_t=B_t, offs=offs)
        return self._backend.grouped_mm(A, B_t, offs)


def sizes(config: GroupedExperts.Config) -> Sizes:
    """What the config says of the experts' sizes."""
    return Sizes(config.num_experts, config.dim, config.hidden_dim)


def selected(
    config: GroupedExperts.Config, backend: ExpertComputeBackend, chosen_by: str
) -> GroupedExperts.Config:
    """The config of the same experts, computed by ``backend``.

    The host's ``derive`` copies every field: init, sharding, and what a later host adds.

    Raises:
        EzpzError: unknown backend; the experts have a selector already; their ``_grouped_mm``
            seam is taken (quantization) or their weights are fused.
    """
    experts_class = selectable(config, backend, chosen_by)
    if experts_class is GroupedExperts:
        selected_class = EzpzGroupedExperts
    else:
        check_seam(experts_class, GroupedExperts, backend, chosen_by)
        selected_class = with_selector(experts_class, _SeamSelector)
    return derive(config, selected_class.Config, compute_backend=backend, chosen_by=chosen_by)


def _local_bf16(weight: torch.Tensor) -> torch.Tensor:
    # As the host does: EP's dynamic shapes cannot be expressed as DTensors.
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.bfloat16()
