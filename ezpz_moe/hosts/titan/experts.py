"""Routed experts of torchtitan 0.3 with a selectable backend.

``EzpzGroupedExperts`` replaces the host's ``GroupedExperts`` and passes the whole SwiGLU FFN to the
backend. All other experts classes of the host (gpt_oss, with biases and a clamped SwiGLU) get the
selector through a subclass made for them, as the host's quantization converters do it. In those,
only the ``_grouped_mm`` seam is replaced. No parameter changes its name, shape, initial value or
state-dict key, so a checkpoint fits every backend.

The host casts the experts' inputs and weights to bfloat16. This binding does the same, unless the
flavor or the CPU wants float32 (:mod:`ezpz_moe.hosts.precision`).

With another activation, or with biases, the parameters are the host's as far as it has them:
without a gate there is no w3, and a bias is called as its weight. The host's own path has no such
formula, so ``grouped_mm`` then composes it of the host's products.
Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import torch
from torch import nn
from torchtitan.config.override import derive
from torchtitan.distributed.spmd_types import spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

from ezpz_moe.compute import get_backend
from ezpz_moe.compute.activations import ACTIVATIONS
from ezpz_moe.compute.arguments import Biases
from ezpz_moe.config.flavor_schema import Activation, ExpertPrecision, Routed
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.backends import HOST_PATH, ExpertComputeBackend
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.precision import HOSTS_CAST, experts_dtype, refuse_precision
from ezpz_moe.hosts.titan.base import Sizes
from ezpz_moe.hosts.titan.expert_biases import added_once, with_biases
from ezpz_moe.hosts.titan.mixed import written_name
from ezpz_moe.hosts.titan.routed_experts import Choices, as_one_node, why_composed
from ezpz_moe.hosts.titan.seam import ROWS, check_seam
from ezpz_moe.hosts.titan.selector import Selector, selectable, with_selector

HostExperts = GroupedExperts
"""The host's class whose config nodes get the selector."""

HostLayer = RoutedExperts
"""The host's class of a routed layer, whose config nodes are replaced."""


class EzpzGroupedExperts(Selector, GroupedExperts):
    """``GroupedExperts`` with its FFN computed by ``config.compute_backend``."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        compute_backend: ExpertComputeBackend = HOST_PATH
        chosen_by: str = "default"
        """Who asked for the backend, for the log."""
        expert_precision: ExpertPrecision | None = None
        """As in the flavor; None leaves it to the rule of :mod:`ezpz_moe.hosts.precision`."""
        computed_in: str = HOSTS_CAST
        """What that means in this run: name of a dtype."""
        why_composed: str | None = None
        """Why dispatch and combination stay the host's; None if the layer is one node. Logged."""
        activation: Activation = "swiglu"
        has_biases: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        self._choose(config)
        self.activation, self.has_biases = config.activation, config.has_biases
        is_gated = ACTIVATIONS[config.activation].is_gated
        if not is_gated:
            self.w3_EFD = None
        if config.has_biases:
            E, D, F = sizes(config)
            self.b1_EF = nn.Parameter(torch.empty(E, F))
            self.b2_ED = nn.Parameter(torch.empty(E, D))
            self.b3_EF = nn.Parameter(torch.empty(E, F)) if is_gated else None
        if _is_other(config):  # the host's own path has no such formula
            self._backend = get_backend(config.compute_backend)
        self._tensor_parallel_degree = 1

    def parallelize(self, parallel_dims: Any) -> None:
        """Shard biases beside their weights, then as the host."""
        sharding: Any = self._sharding_config  # type: ignore[has-type]
        if self.has_biases and sharding is not None:
            self._sharding_config = with_biases(sharding)
        # Expert parallelism splits the tokens of a tensor-parallel group, not the hidden dimension.
        if not parallel_dims.ep_enabled:
            self._tensor_parallel_degree = parallel_dims.tp
        super().parallelize(parallel_dims)

    def forward(
        self,
        x_RD: torch.Tensor,
        num_tokens_per_expert_E: torch.Tensor,
        *,
        choices: Choices | None = None,
    ) -> torch.Tensor:
        """Compute the expert FFN of rows, or with ``choices`` the whole routed layer of tokens.

        Args:
            x_RD: rows sorted by expert, possibly with tail rows; with ``choices`` x_TD, tokens.
            num_tokens_per_expert_E: integer counts of the local experts.
            choices: of which experts each token is a row, if the backend is to dispatch.

        Returns:
            y_RD, or out_TD, in x's dtype. Device syncs: those of the backend.
        """
        if self._backend is None:
            return super().forward(x_RD, num_tokens_per_expert_E)
        num_tokens_per_expert_E = _of_this_rank(num_tokens_per_expert_E)
        self._count(choices.num_rows if choices else x_RD.shape[0], num_tokens_per_expert_E)
        # As the host does: DTensors cannot express the dynamic shapes of expert parallelism.
        weights = [_local(each) for each in (self.w1_EFD, self.w2_EDF, self.w3_EFD)]
        biases = self._biases()
        if choices:
            scores_TK, ids_TK, num_rows = choices
            tokens = (x_RD, scores_TK, ids_TK, num_tokens_per_expert_E)
            return self._backend.routed(
                *weights,
                *tokens,
                num_rows=num_rows,
                dtype=self.computed_in,
                activation=self.activation,
                biases=biases,
                trained_E=self.trained_E,
            )
        rows = _cast((*weights, x_RD), self.computed_in)
        return self._backend.ffn(
            *rows,
            num_tokens_per_expert_E,
            activation=self.activation,
            biases=biases and Biases(*_cast(biases, self.computed_in)),
            trained_E=self.trained_E,
        ).type_as(x_RD)

    def _biases(self) -> Biases | None:
        if not self.has_biases:
            return None
        b1_EF, b2_ED, b3_EF = map(_local, (self.b1_EF, self.b2_ED, self.b3_EF))
        return Biases(b1_EF, added_once(b2_ED, self._tensor_parallel_degree), b3_EF)

    def _formula(self, config: Any) -> str:
        with_biases = " with biases" if config.has_biases else ""
        return f"{config.activation} experts{with_biases}" if _is_other(config) else ""


def _is_other(config: Any) -> bool:
    """Return whether the FFN is another than the host's."""
    return config.activation != "swiglu" or config.has_biases


def _local(parameter: Any) -> Any:
    return None if parameter is None else local(parameter)


def _cast(tensors: Iterable[torch.Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [None if each is None else each.to(dtype) for each in tensors]


def _of_this_rank(num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    """Return the counts, which the host's type checker may take beside the rank's own rows.

    To it they are a part of a sum over data-parallel ranks, as they are in the router's statistics.
    """
    is_checked = get_spmd_backend() == "spmd_types" and spmd.is_type_checking()
    if not is_checked or spmd_mesh_size("ep") > 1:  # the host's dispatcher has told it by then
        return num_tokens_per_expert_E
    own_E = num_tokens_per_expert_E.clone()
    for axis in ("dp", "cp"):
        spmd.mutate_type(own_E, axis, src=spmd.P, dst=spmd.V)
    return own_E


class _SeamSelector(Selector):
    """For all other experts classes: replaces only the ``_grouped_mm`` seam."""

    # Same parameter names as the host's: it looks up the shardings of inputs by these names.
    def forward(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
        self._count(x_RD.shape[0], num_tokens_per_expert_E)
        # gpt_oss returns bfloat16 whatever its input is. In a float32 run the host's combine step
        # would then refuse to add up the rows.
        return super().forward(x_RD, num_tokens_per_expert_E).type_as(x_RD)

    def _grouped_mm(
        self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor
    ) -> torch.Tensor:
        if self._backend is None:
            return super()._grouped_mm(A=A, B_t=B_t, offs=offs)
        # Only the products: biases and activation stay the host's.
        return self._backend.grouped_mm(A, B_t, offs)


def sizes(config: GroupedExperts.Config) -> Sizes:
    """Return the experts' sizes from their config."""
    return Sizes(config.num_experts, config.dim, config.hidden_dim)


def resize(
    config: GroupedExperts.Config,
    *,
    num_experts: int | None = None,
    dim: int | None = None,
    hidden_dim: int | None = None,
) -> None:
    """Give the experts other sizes, in place; None keeps one."""
    config.num_experts = num_experts or config.num_experts
    config.dim = dim or config.dim
    config.hidden_dim = hidden_dim or config.hidden_dim


def initial_values(config: GroupedExperts.Config) -> tuple[Any, Any, Any] | None:
    """Return what gate, down and up are drawn with; None for experts of another kind."""
    draws = config.param_init or {}
    names = ("w1_EFD", "w2_EDF", "w3_EFD")
    return tuple(draws[name] for name in names) if draws.keys() >= set(names) else None


def selected(
    config: GroupedExperts.Config,
    backend: ExpertComputeBackend,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
    why_composed: str | None = None,
) -> GroupedExperts.Config:
    """Return the config of the same experts, computed by ``backend``.

    The host's ``derive`` copies every field: init, sharding, and what a later host adds.

    Raises:
        EzpzError: unknown backend; the experts have a selector already; they compute products
            beside the ``_grouped_mm`` seam (quantization); their forward has a precision of its
            own.
    """
    experts_class = selectable(config, backend, chosen_by)
    choice = {"compute_backend": backend, "chosen_by": chosen_by, "why_composed": why_composed}
    if experts_class is GroupedExperts:
        refuse_precision(expert_precision, backend, chosen_by)
        # A first value, without the rule for this CPU: `precision.settle` applies that once the
        # flags are known. Under door 2 this value stays.
        return derive(
            config,
            EzpzGroupedExperts.Config,
            **choice,
            expert_precision=expert_precision,
            computed_in=experts_dtype(expert_precision, HOSTS_CAST, "cpu"),
        )

    def compute(experts: GroupedExperts) -> torch.Tensor:
        counts_E = torch.empty(config.num_experts, dtype=torch.int64, device="meta")
        return experts(torch.empty(ROWS, config.dim, device="meta"), counts_E)

    check_seam(config, GroupedExperts, backend, chosen_by, compute)
    host_class = experts_class.__name__
    refuse_precision(expert_precision, backend, chosen_by, hosts_forward=host_class)
    return derive(config, with_selector(experts_class, _SeamSelector).Config, **choice)


def selected_layer(
    config: RoutedExperts.Config,
    backend: ExpertComputeBackend,
    chosen_by: str,
    expert_precision: ExpertPrecision | None = None,
    routed: Routed = "one_node",
) -> RoutedExperts.Config:
    """Return the config of the same routed layer, with experts computed by ``backend``.

    Raises:
        EzpzError: as :func:`selected`.
    """
    selectable(config.inner_experts, backend, chosen_by)
    why = why_composed(config, backend, routed)
    experts = selected(config.inner_experts, backend, chosen_by, expert_precision, why)
    host_class = type(config)._owner
    layer_class = host_class if backend == HOST_PATH or why else as_one_node(host_class)
    return derive(config, layer_class.Config, inner_experts=experts)


def computing(config: Any, activation: Activation, has_biases: bool, where: str) -> Any:
    """Return the config of the same experts with another activation, or with biases.

    Args:
        config: of :func:`selected`.
        activation: the flavor's.
        has_biases: whether every product has a bias, which begins as zero.
        where: who asks for it, for the message.

    Raises:
        EzpzError: the host's experts compute another FFN than SwiGLU.
    """
    if not isinstance(config, EzpzGroupedExperts.Config):
        key = "expert_bias" if activation == "swiglu" else "expert_activation"
        raise EzpzError(
            f"{where}: {key}: the experts of this model ({written_name(type(config)._owner)}) "
            "compute an FFN of their own. Remove it, or choose a model with torchtitan's "
            "GroupedExperts."
        )
    zeros = dict.fromkeys(("b1_EF", "b2_ED", "b3_EF"), nn.init.zeros_) if has_biases else {}
    return derive(
        config,
        EzpzGroupedExperts.Config,
        activation=activation,
        has_biases=has_biases,
        param_init={**(config.param_init or {}), **zeros},
    )
