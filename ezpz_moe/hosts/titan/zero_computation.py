"""Leave out assignments to zero-computation experts, of padding, and beyond a capacity.

The host's router, dispatcher and experts do the rest unchanged. What is not computed gets an id
beyond those of the routed experts. The dispatcher's sort then puts it last, where it is cut off.
None of it leaves the rank under expert parallelism.

Legend of the suffixes: :mod:`ezpz_moe.routing`; N = T * K assignments, R = those computed,
C = constant experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torchtitan.config.override import derive
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.moe import MoE, RoutedExperts
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from ezpz_moe.config.routing_schema import Balance, Router
from ezpz_moe.hosts.titan.groups import TokenMask
from ezpz_moe.hosts.titan.mixed import mixed, named_after
from ezpz_moe.routing.capacity import beyond_capacity, capacity
from ezpz_moe.routing.counters import CHOICES, count_dropped
from ezpz_moe.routing.gate import constant_output, weight_of


class ConstantExperts(Module):
    """The learned vectors and mixes of the constant experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        experts: int

    def __init__(self, config: Config):
        super().__init__()
        self.mix_C2D = nn.Parameter(torch.empty(config.experts, 2, config.dim))
        self.vectors_CD = nn.Parameter(torch.empty(config.experts, config.dim))

    def reset_parameters(self) -> None:
        """Set vectors as small as the host's embedding noise, and even mixes."""
        nn.init.zeros_(self.mix_C2D)
        nn.init.trunc_normal_(self.vectors_CD, std=0.02)

    def forward(self, x_BLD: Tensor, weight_BLC: Tensor) -> Tensor:
        return constant_output(x_BLD, weight_BLC, self.mix_C2D, self.vectors_CD)


class Choices(Module):
    """Counts the choices of routed experts, and those that a capacity leaves out, in training.

    A module of its own: the host asks how each buffer beside experts is sharded.
    """

    choices_2: Tensor

    def __init__(self):
        super().__init__()
        # Not persistent: a checkpoint must have the same keys as the host's own model.
        choices_2 = torch.zeros(len(CHOICES), dtype=torch.int64)
        self.register_buffer("choices_2", choices_2, persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.choices_2.device
        self.choices_2 = torch.zeros_like(self.choices_2, device=device)


class _Dispatcher:
    """Mixin before a dispatcher of the host: cuts off what is beyond the routed experts."""

    routed_experts: int
    cuts_off = True

    def _local_reorder(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor
    ) -> tuple[Tensor, ...]:
        """Reorder as the host does, with R rows instead of N. Device syncs: one, for R."""
        R = self.computed(topk_expert_ids_TK)
        reorder = super()._local_reorder  # type: ignore[misc]
        sorted_N = reorder(x_TD, topk_scores_TK, topk_expert_ids_TK)
        return tuple(each[:R] for each in sorted_N)

    def computed(self, topk_expert_ids_TK: Tensor) -> int:
        """Return R. ``route_evenly`` replaces this method if tensors have no values."""
        if not self.cuts_off:
            return topk_expert_ids_TK.numel()
        return int((topk_expert_ids_TK < self.routed_experts).sum())


class _RoutedExperts(Module):
    """Mixin before the host's RoutedExperts."""

    def _set_up(self, config: Any) -> None:
        settings: Router = config.settings
        E = self.token_dispatcher.routed_experts = config.token_dispatcher.num_experts
        self.last_null = E + settings.null_experts
        self.last_copy = self.last_null + settings.copy_experts
        self.last_constant = self.last_copy + settings.constant_experts
        cuts = settings.masks_padding and settings.dispatch_padding is not True
        self.masked_by: TokenMask | None = TokenMask() if cuts else None
        self.constant_experts = config.constants.build() if config.constants else None
        self.balance: Balance = config.balance
        self.choices = Choices() if self.balance.capacity_factor else None

    def _compute(
        self, x_BLD: Tensor, weights_BLK: Tensor, ids_BLK: Tensor, counts_E: Tensor
    ) -> Tensor:
        E = self.token_dispatcher.routed_experts
        # The host's MoE counts all choices; the experts expect one count per routed expert.
        counts_E = counts_E[:E]
        if self.masked_by is not None:
            mask_BL = self.masked_by.of(weights_BLK)
            # Padding gets an id that no expert has, so it is sorted last and adds nothing to the
            # output.
            ids_BLK = torch.where(mask_BL.unsqueeze(-1), ids_BLK, self.last_constant)
        # In training only: which tokens are dropped depends on the others of the batch, which at
        # inference would include later ones.
        has_capacity = self.choices is not None and self.training
        if has_capacity:
            ids_BLK = self._within_capacity(weights_BLK, ids_BLK)
        if has_capacity or self.masked_by is not None:
            # Counted again without these. The extra slot collects everything that is not computed.
            chosen_E = torch.zeros(E + 1, dtype=counts_E.dtype, device=counts_E.device)
            slots_N = ids_BLK.flatten().clamp(max=E)
            counts_E = chosen_E.scatter_add(0, slots_N, torch.ones_like(slots_N))[:E]
        out_BLD = super().forward(x_BLD, weights_BLK, ids_BLK, counts_E)
        # The host has combined only computed rows. Copies and constants are added here, on the
        # token's own rank, without dispatch. Null experts add nothing.
        if self.last_copy > self.last_null:
            copied_BL1 = weight_of(weights_BLK, ids_BLK, self.last_null, self.last_copy)
            out_BLD = out_BLD + (x_BLD * copied_BL1).to(out_BLD.dtype)
        if self.constant_experts is not None:
            weight_BLC = torch.cat(
                [
                    weight_of(weights_BLK, ids_BLK, expert, expert + 1)
                    for expert in range(self.last_copy, self.last_constant)
                ],
                dim=-1,
            )
            out_BLD = out_BLD + self.constant_experts(x_BLD, weight_BLC).to(out_BLD.dtype)
        return out_BLD

    def _num_rows(self, topk_expert_ids_TK: Tensor) -> int:
        R = self.token_dispatcher.computed(topk_expert_ids_TK)
        # torch.compile does not know it while it traces, but has to know that the backend's check
        # of its arguments passes.
        torch._check(R >= 0)
        torch._check(topk_expert_ids_TK.numel() >= R)
        return R

    def _within_capacity(self, weights_BLK: Tensor, ids_BLK: Tensor) -> Tensor:
        """Return ids_BLK, with an id that no expert has for the choices beyond the capacity."""
        assert self.choices is not None
        balance, E = self.balance, self.token_dispatcher.routed_experts
        places = capacity(
            ids_BLK.numel(),
            self.last_constant,
            factor=balance.capacity_factor,
            least=balance.min_capacity,
        )
        ids_TK, weights_TK = ids_BLK.flatten(0, -2), weights_BLK.flatten(0, -2)
        by_weight = balance.drop == "probability"
        is_beyond_TK = beyond_capacity(
            ids_TK, weights_TK, experts=E, capacity=places, by_weight=by_weight
        )
        count_dropped(self.choices.choices_2, is_beyond_TK, ids_TK, E)
        return torch.where(is_beyond_TK.view_as(ids_BLK), self.last_constant, ids_BLK)


class _MoE(Module):
    """Mixin before the host's MoE: counts and biases cover all choices of the router."""

    tokens_per_expert_E: Tensor
    expert_bias_E: Tensor | None

    def __init__(self, config: Any):
        super().__init__(config)
        # For a model that is built and not initialized, to look at its memory.
        self._size_counts()

    def _size_counts(self) -> None:
        # One more for choices of none, which the host counts too.
        counted = self.router.num_experts + self.router.settings.has_unchosen
        self.tokens_per_expert_E = self.tokens_per_expert_E.new_zeros(counted)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        super()._init_self_buffers(buffer_device=buffer_device)
        # The host sizes both by the routed experts that it holds, which are fewer than the choices.
        choices = self.router.num_experts
        self._size_counts()
        if self.expert_bias_E is not None:
            self.expert_bias_E = self.expert_bias_E.new_zeros(choices)


@cache
def _routed_experts_like(host_class: type[RoutedExperts]) -> Any:
    class WithZeroComputation(_RoutedExperts, host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            settings: Router
            constants: ConstantExperts.Config | None = None
            balance: Balance = field(default_factory=Balance)

        def __init__(self, config: Config):
            super().__init__(config)
            self._set_up(config)

        # The host looks up the shardings of inputs by the names of its own parameters.
        @wraps(host_class.forward)
        def forward(self, *inputs: Tensor) -> Tensor:
            return self._compute(*inputs)

    return named_after(WithZeroComputation, host_class)


def _constant_experts(dim: int, experts: int) -> ConstantExperts.Config | None:
    if not experts:
        return None
    # Every parameter needs a layout under spmd_types, or FSDP refuses the plain tensor. Replicated:
    # the vectors are small, and each rank adds them for its own tokens.
    whole = dense_param_placement(tp=spmd.R)
    layout = ShardingConfig(state_shardings={"mix_C2D": whole, "vectors_CD": whole})
    return ConstantExperts.Config(dim=dim, experts=experts, sharding_config=layout)


def dispatch_padding(model: nn.Module) -> None:
    """Dispatch padding like any token again, in place, without the device sync that it saves.

    Zero-computation experts keep theirs.
    """
    for module in model.modules():
        if isinstance(module, _RoutedExperts):
            module.masked_by = None
            E = module.token_dispatcher.routed_experts
            module.token_dispatcher.cuts_off = (
                module.last_constant > E or module.choices is not None
            )


def route_evenly(model: nn.Module) -> None:
    """Use all choices equally and count no token as padding, for tensors without values."""
    for module in model.modules():
        if isinstance(module, _RoutedExperts):
            share = module.token_dispatcher.routed_experts / module.last_constant
            module.token_dispatcher.computed = partial(_share_of, share)


def _share_of(share: float, topk_expert_ids_TK: Tensor) -> int:
    return round(share * topk_expert_ids_TK.numel())


def with_zero_computation(moe: MoE.Config, settings: Router, balance: Balance) -> MoE.Config:
    """Return the config of the same layer that leaves assignments out: see the module's text.

    The gate gets a logit for each of them, and the top-k is raised.
    """
    E, Z = moe.router.num_experts, settings.zero_computation_experts
    K = settings.choices_of_token(E, moe.router.top_k)
    dispatcher = moe.routed_experts.token_dispatcher
    constants = _constant_experts(moe.router.gate.in_features, settings.constant_experts)
    routed_experts = derive(
        moe.routed_experts,
        _routed_experts_like(type(moe.routed_experts)._owner).Config,
        # The dispatcher still sorts K choices per token, but holds only the E that compute.
        token_dispatcher=derive(
            dispatcher,
            mixed(type(dispatcher)._owner, _Dispatcher).Config,
            num_experts=E,
            top_k=K,
        ),
        settings=settings,
        constants=constants,
        balance=balance,
    )
    gate = derive(moe.router.gate, type(moe.router.gate), out_features=E + Z)
    router = derive(moe.router, type(moe.router), gate=gate, num_experts=E + Z, top_k=K)
    return derive(
        moe,
        mixed(type(moe)._owner, _MoE).Config,
        num_experts=E + Z,
        router=router,
        routed_experts=routed_experts,
    )
