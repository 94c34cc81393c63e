"""Routed experts of torchtitan since September 2026 with a selectable backend.

``RoutedExperts`` holds its projections itself: ``w13`` [E, 2, F, D], gate and up in one product,
and ``w2`` [E, D, F]. Both are ``GroupedLinear``, which has the ``_grouped_mm`` seam. A backend
replaces that seam in every model, also in gpt_oss, whose linears add a bias. The host's
``forward`` dispatches, computes and combines in one go, so the whole FFN cannot be passed on.

Legend of the suffixes: R = routed tokens, E = local experts, I and O = inner and outer dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torchtitan.config.override import derive
from torchtitan.models.common.linear import GroupedLinear
from torchtitan.models.common.moe import RoutedExperts

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavor_schema import Activation, ExpertPrecision, Routed
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import HOST_PATH, ExpertComputeBackend
from ezpz_moe.hosts.precision import refuse_precision
from ezpz_moe.hosts.titan.base import Sizes
from ezpz_moe.hosts.titan.routed_experts_2026_09 import why_composed
from ezpz_moe.hosts.titan.seam import check_seam
from ezpz_moe.hosts.titan.selector import Selector, selectable, with_selector

HostExperts = HostLayer = RoutedExperts
"""The host's class whose config nodes get the selector: its layer and its experts are one."""


class _CountedByLinear(Selector):
    """Counts rows in w13: they exist only inside the host's forward, after dispatch."""

    def _choose(self, config) -> None:
        super()._choose(config)
        if self.row_counts is not None:
            self.w13.on_rows = self._count_up_to

    def _count_up_to(self, x_RD: torch.Tensor, offsets_E: torch.Tensor) -> None:
        # The seam gets offsets, the counter wants counts.
        self._count(x_RD.shape[0], torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)))


EzpzGroupedExperts = with_selector(RoutedExperts, _CountedByLinear)
"""The host's routed experts with the selector, under the name used in every binding."""


@cache
def _on_backend(linear_class: type[GroupedLinear]) -> type[GroupedLinear]:
    """Return ``linear_class`` with its product computed by ``config.compute_backend``."""

    class OnBackend(linear_class):
        @dataclass(kw_only=True, slots=True)
        class Config(linear_class.Config):  # type: ignore[name-defined]
            compute_backend: ExpertComputeBackend

        def __init__(self, config: Config):
            super().__init__(config)
            self._backend = get_backend(config.compute_backend)
            self.on_rows: Callable[[torch.Tensor, torch.Tensor], None] | None = None

        def _grouped_mm(
            self, *, input_RI: torch.Tensor, weight_EOI: torch.Tensor, offsets_E: torch.Tensor
        ) -> torch.Tensor:
            if self.on_rows is not None:
                self.on_rows(input_RI, offsets_E)
            # The host's own cast, which it has on this side of the seam.
            weight_EIO = weight_EOI.bfloat16().transpose(-2, -1)
            return self._backend.grouped_mm(input_RI, weight_EIO, offsets_E)

    OnBackend.__name__ = OnBackend.__qualname__ = f"Ezpz{linear_class.__name__}"
    return OnBackend


def _refuse_own_forward(
    linear_class: type[GroupedLinear], backend: ExpertComputeBackend, chosen_by: str
) -> None:
    """Refuse a linear whose forward is not of one of the host's models, which use the seam."""
    if backend != HOST_PATH and not linear_class.forward.__module__.startswith(
        "torchtitan.models."
    ):
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): {linear_class.__name__} has a forward of "
            "its own, which may multiply without the backend. Choose a model with torchtitan's own "
            "linears, or do not select a backend."
        )


def sizes(config: RoutedExperts.Config) -> Sizes:
    """Return the experts' sizes from their config."""
    w13 = config.w13
    return Sizes(w13.group_size, w13.in_features, w13.out_features)


def resize(
    config: RoutedExperts.Config,
    *,
    num_experts: int | None = None,
    dim: int | None = None,
    hidden_dim: int | None = None,
) -> None:
    """Give the experts other sizes, in place; None keeps one."""
    old = sizes(config)
    w13, w2 = config.w13, config.w2
    w13.group_size = w2.group_size = num_experts or old.num_experts
    w13.in_features = w2.out_features = dim or old.dim
    w13.out_features = w2.in_features = hidden_dim or old.hidden_dim


def initial_values(config: RoutedExperts.Config) -> tuple[Any, Any, Any] | None:
    """Return what the experts' gate, down and up are drawn with; gate and up are one linear."""
    gate_and_up, down = config.w13.param_init["weight"], config.w2.param_init["weight"]
    return gate_and_up, down, gate_and_up


def selected(
    config: RoutedExperts.Config,
    backend: ExpertComputeBackend,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
    why_composed: str | None = None,
) -> RoutedExperts.Config:
    """Return the config of the same experts, with their products computed by ``backend``.

    The host's ``derive`` copies every field: init, sharding, and what a later host adds.

    Raises:
        EzpzError: unknown backend; the experts have a selector already; they or their linears
            compute by themselves (fused dispatch, quantization); another precision than the
            host's, whose forward casts.
    """
    experts_class = selectable(config, backend, chosen_by)
    host_class = experts_class.__name__
    refuse_precision(expert_precision, backend, chosen_by, hosts_forward=host_class)
    # Another forward would compute without the linears: the run would train with the host's
    # products while the log names our backend.
    if experts_class.forward is not RoutedExperts.forward:
        raise EzpzError(
            f"compute_backend {backend!r} ({chosen_by}): {experts_class.__name__} has a forward of "
            f"its own, which a backend cannot take part in. Choose a model or an "
            f"expert_parallel_comm_backend with torchtitan's RoutedExperts, or do not select a "
            f"backend."
        )
    linears: dict[str, Any] = {}
    for name in ("w13", "w2"):
        linear = getattr(config, name)
        check_seam(linear, GroupedLinear, backend, chosen_by)
        _refuse_own_forward(type(linear)._owner, backend, chosen_by)
        # On the host's own path the linears stay as they are: nothing of ours may touch those
        # results.
        if backend != HOST_PATH:
            on_backend = _on_backend(type(linear)._owner).Config
            linears[name] = derive(linear, on_backend, compute_backend=backend)
    selected_config = with_selector(experts_class, _CountedByLinear).Config
    choice = {"compute_backend": backend, "chosen_by": chosen_by, "why_composed": why_composed}
    return derive(config, selected_config, **choice, **linears)


def selected_layer(
    config: RoutedExperts.Config,
    backend: ExpertComputeBackend,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
    routed: Routed = "one_node",
) -> RoutedExperts.Config:
    """Return :func:`selected`; ``routed`` has no effect but on what the log says.

    Raises:
        EzpzError: as :func:`selected`.
    """
    return selected(config, backend, chosen_by, expert_precision, why_composed(routed))


def computing(config: Any, activation: Activation, has_biases: bool, where: str) -> Any:
    """Refuse another FFN: the host's forward computes the activation between its two products.

    Raises:
        EzpzError: always; ``where`` is who asks.
    """
    key = "expert_bias" if activation == "swiglu" else "expert_activation"
    raise EzpzError(
        f"{where}: {key}: this torchtitan computes its SwiGLU between two linears, which a backend "
        "cannot replace. Remove it, or install torchtitan 0.3."
    )
