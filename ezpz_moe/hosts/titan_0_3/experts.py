"""Routed experts of torchtitan 0.3 with a selectable backend.

``EzpzGroupedExperts`` replaces the host's ``GroupedExperts``: it hands the whole SwiGLU FFN to the
backend. Every other experts class of the host (gpt_oss, with its biases and clamped SwiGLU) gets
the selector through a subclass made for it, as the host's quantization converters do, and only
its ``_grouped_mm`` seam is replaced. No parameter changes its name, shape, initial value or
state-dict key, so that a checkpoint of one backend is a checkpoint of all.

The host casts experts' inputs and weights to bfloat16; so does this binding.
Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch.distributed.tensor import DTensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.tools.logging import logger

from ezpz_moe.compute import get_backend
from ezpz_moe.errors import EzpzError

ExpertComputeBackend: TypeAlias = str
"""Name of an installed backend; ``ezpz_moe.compute.backend_names()`` lists them."""

HOST_PATH: ExpertComputeBackend = "grouped_mm"
"""The backend that is the host's own code, untouched."""


class _Selector(GroupedExperts):
    """What both kinds of experts share: the chosen backend, None for the host's own path."""

    def _choose(self, config) -> None:
        self.compute_backend = config.compute_backend
        backend = get_backend(self.compute_backend)  # an unknown name is an error at once
        self._backend = None if self.compute_backend == HOST_PATH else backend
        _choices_not_logged[self.compute_backend, config.chosen_by] += 1

    def _init_self_parameters(self) -> None:
        super()._init_self_parameters()
        _log_choices(next(self.parameters()).device)


class EzpzGroupedExperts(_Selector):
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
        w1_EFD, w2_EDF, w3_EFD = map(_local_bf16, (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        y_RD = self._backend.swiglu(
            w1_EFD, w2_EDF, w3_EFD, x_RD.bfloat16(), num_tokens_per_expert_E
        )
        return y_RD.type_as(x_RD)


@cache
def with_selector(experts_class: type[GroupedExperts]) -> type[GroupedExperts]:
    """``experts_class`` with a ``compute_backend`` that replaces its ``_grouped_mm`` seam."""
    if experts_class is GroupedExperts:
        return EzpzGroupedExperts

    class SelectedExperts(_Selector, experts_class):
        @dataclass(kw_only=True, slots=True)
        class Config(experts_class.Config):  # type: ignore[name-defined]
            compute_backend: ExpertComputeBackend = HOST_PATH
            chosen_by: str = "default"

        def __init__(self, config: Config):
            experts_class.__init__(self, config)
            self._choose(config)

        def _grouped_mm(
            self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor
        ) -> torch.Tensor:
            if self._backend is None:
                return super()._grouped_mm(A=A, B_t=B_t, offs=offs)
            return self._backend.grouped_mm(A, B_t, offs)

    SelectedExperts.__name__ = SelectedExperts.__qualname__ = f"Ezpz{experts_class.__name__}"
    return SelectedExperts


def selected(
    config: GroupedExperts.Config, backend: ExpertComputeBackend, chosen_by: str
) -> GroupedExperts.Config:
    """The config of the same experts, computed by ``backend``.

    The host's ``derive`` copies every field: init, sharding, and what a later host adds.

    Raises:
        EzpzError: unknown backend; the experts have a selector already; their ``_grouped_mm``
            seam is taken (quantization) or their weights are fused.
    """
    get_backend(backend)
    experts_class = type(config)._owner
    assert experts_class is not None
    if issubclass(experts_class, _Selector):
        raise EzpzError(
            f"compute_backend is selected twice: {config.chosen_by} asks for "
            f"{config.compute_backend!r}, and {chosen_by} for {backend!r}. Remove one of them."
        )
    if experts_class._grouped_mm is not GroupedExperts._grouped_mm:
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): {experts_class.__name__} computes the "
            f"experts' products itself (quantized grouped GEMM). Remove the quantization "
            f"converter of the experts, or do not select a backend."
        )
    return derive(
        config,
        with_selector(experts_class).Config,
        compute_backend=backend,
        chosen_by=chosen_by,
    )


def select_backend(model_config, backend: ExpertComputeBackend, chosen_by: str) -> int:
    """Replace every routed-experts node below ``model_config``, in place.

    Returns:
        How many nodes were replaced: one per MoE layer.

    Raises:
        EzpzError: as :func:`selected`, or the model has no routed experts.
    """
    nodes = list(model_config.traverse(GroupedExperts.Config))
    if not nodes:
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): the model has no routed experts, so "
            f"there is nothing to compute with it. Choose a Mixture-of-Experts model."
        )
    for _, config, parent, attribute in nodes:
        setattr(parent, attribute, selected(config, backend, chosen_by))
    return len(nodes)


def _local_bf16(weight: torch.Tensor) -> torch.Tensor:
    # As the host does: EP's dynamic shapes cannot be expressed as DTensors.
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.bfloat16()


_choices_not_logged: Counter[tuple[ExpertComputeBackend, str]] = Counter()


def _log_choices(device: torch.device) -> None:
    """One line per choice and run, when the first experts get their weights.

    All layers are built before any is initialized, so that the count is complete, and the device
    is the one that trains. Said nowhere in forward: the host compiles it with fullgraph=True.
    """
    for (backend, chosen_by), layers in _choices_not_logged.items():
        path = "the host's own path" if backend == HOST_PATH else get_backend(backend).summary
        logger.info(
            f"ezpz_moe: compute_backend {backend} ({path}) on {device.type} in bfloat16 "
            f"for {layers} MoE layers; {chosen_by}"
        )
    _choices_not_logged.clear()
