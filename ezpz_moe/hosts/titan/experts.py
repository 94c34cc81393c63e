"""Routed experts of torchtitan 0.3 with a selectable backend.

``EzpzGroupedExperts`` replaces the host's ``GroupedExperts``: it hands the whole SwiGLU FFN to the
backend. Every other experts class of the host (gpt_oss, with its biases and clamped SwiGLU) gets
the selector through a subclass made for it, as the host's quantization converters do, and only
its ``_grouped_mm`` seam is replaced. No parameter changes its name, shape, initial value or
state-dict key, so that a checkpoint of one backend is a checkpoint of all.

The host casts experts' inputs and weights to bfloat16; so does this binding, unless the flavor or
the CPU wants float32 (:mod:`ezpz_moe.hosts.precision`).
Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from dataclasses import dataclass

import torch
from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts

from ezpz_moe.config.flavor_schema import ExpertPrecision
from ezpz_moe.hosts.backends import HOST_PATH, ExpertComputeBackend
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.precision import HOSTS_CAST, experts_dtype, refuse_precision
from ezpz_moe.hosts.titan.base import Sizes
from ezpz_moe.hosts.titan.selector import (
    Selector,
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
        expert_precision: ExpertPrecision | None = None
        """As the flavor asks; None leaves it to the rule of :mod:`ezpz_moe.hosts.precision`."""
        computed_in: str = HOSTS_CAST
        """What that means in this run: the name of a dtype."""

    def __init__(self, config: Config):
        super().__init__(config)
        self._dtype = getattr(torch, config.computed_in)
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
        weights = (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        # As the host does: EP's dynamic shapes cannot be expressed as DTensors.
        w1_EFD, w2_EDF, w3_EFD = (local(weight).to(self._dtype) for weight in weights)
        y_RD = self._backend.swiglu(
            w1_EFD, w2_EDF, w3_EFD, x_RD.to(self._dtype), num_tokens_per_expert_E
        )
        return y_RD.type_as(x_RD)


class _SeamSelector(Selector):
    """For every other experts class: its ``_grouped_mm`` seam alone is replaced."""

    # The host looks up the shardings of inputs by the names of its own parameters.
    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        self._count(x_RD, num_tokens_per_expert_E)
        # gpt_oss answers in bfloat16 whatever it is given, and the host's combination then refuses
        # to add the rows up where the run is in float32.
        return super().forward(x_RD, num_tokens_per_expert_E).type_as(x_RD)

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
    config: GroupedExperts.Config,
    backend: ExpertComputeBackend,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
) -> GroupedExperts.Config:
    """The config of the same experts, computed by ``backend``.

    The host's ``derive`` copies every field: init, sharding, and what a later host adds.

    Raises:
        EzpzError: unknown backend; the experts have a selector already; their ``_grouped_mm``
            seam is taken (quantization) or their weights are fused; their forward has a
            precision of its own.
    """
    experts_class = selectable(config, backend, chosen_by)
    choice = {"compute_backend": backend, "chosen_by": chosen_by}
    if experts_class is GroupedExperts:
        refuse_precision(expert_precision, backend, chosen_by)
        return derive(
            config,
            EzpzGroupedExperts.Config,
            **choice,
            expert_precision=expert_precision,
            computed_in=experts_dtype(expert_precision, HOSTS_CAST, "cpu"),
        )
    check_seam(experts_class, GroupedExperts, backend, chosen_by)
    host_class = experts_class.__name__
    refuse_precision(expert_precision, backend, chosen_by, hosts_forward=host_class)
    return derive(config, with_selector(experts_class, _SeamSelector).Config, **choice)
