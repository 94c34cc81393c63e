"""The host's router and gate with what a flavor's ``[router]`` and ``[balance]`` ask for.

Scoring, groups, bias, norm and scale are the host's own. The gate is a subclass that changes what
goes into it and the logits that come out; the router is one that may choose otherwise, adds the
gradient of the balance losses, and counts.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.module import Module

from ezpz_moe.config.routing_schema import Balance, Router
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.titan.mixed import mixed, named_after
from ezpz_moe.routing import losses
from ezpz_moe.routing.assignment import balanced_experts, perturbed, sinkhorn
from ezpz_moe.routing.balance import inject, value_at
from ezpz_moe.routing.counters import SUMS, count
from ezpz_moe.routing.gate import activated, jittered, losing_infinities


class TokenMask:
    """Which tokens of the microbatch at hand count: set before a model's forward."""

    mask_BL: Tensor | None = None

    def of(self, scores_BLE: Tensor) -> Tensor:
        """mask_BL, bool: all tokens where nothing says otherwise.

        Raises:
            ValueError: the mask is of another shape or dtype than the router's tokens.
        """
        if self.mask_BL is None:
            return torch.ones(scores_BLE.shape[:-1], dtype=torch.bool, device=scores_BLE.device)
        if self.mask_BL.dtype != torch.bool or self.mask_BL.shape != scores_BLE.shape[:-1]:
            raise ValueError(
                f"the router's mask must be bool and {tuple(scores_BLE.shape[:-1])}, as its "
                f"tokens are; it is {self.mask_BL.dtype} and {tuple(self.mask_BL.shape)}"
            )
        return self.mask_BL


@dataclass
class Groups:
    """Over what a balance loss is averaged.

    Attributes:
        by_sequence: whether a group is a sequence, not all tokens.
        length: of a sequence, for a host whose tensors do not tell.
        meshes: over which a group is spread.
        weight: of a group in the mean over all groups of a training step.
        copies: ranks that compute the same group, and whose gradients the host adds up.
    """

    by_sequence: bool = True
    length: int = 0
    meshes: tuple[Any, ...] = ()
    weight: float = 1.0
    copies: int = 1

    def share(self, addend: Tensor) -> Tensor:
        """The sum over the ranks of a group, with the gradient of the own addend."""
        if not self.meshes:
            return addend
        total = addend.detach()
        for mesh in self.meshes:
            total = collectives.all_reduce(total, "sum", mesh.get_group())
        return addend + (total - addend.detach())

    @property
    def ranks(self) -> int:
        """Ranks of a group."""
        ranks = 1
        for mesh in self.meshes:
            ranks *= mesh.size()
        return ranks


class _Gate(Module):
    """Mixin before the host's linear gate."""

    def forward(self, input: Tensor) -> Tensor:
        settings: Router = self.settings
        if self.training and settings.jitter_noise:
            input = jittered(input, settings.jitter_noise)
        logits_BLE = self._project(input)
        if self.temperature is not None:
            logits_BLE = logits_BLE / self.temperature
        if not (self.is_counted and settings.activation == "identity"):
            logits_BLE = losing_infinities(logits_BLE)
        self.logits_BLE = activated(logits_BLE, settings.activation)
        return self.logits_BLE

    def _project(self, input: Tensor) -> Tensor:
        if self.settings.gate_precision is None:
            return super().forward(input)
        dtype = getattr(torch, self.settings.gate_precision)
        bias_E = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            logits_BLE = F.linear(input.to(dtype), self.weight.to(dtype), bias_E)
        # Only the product has that precision: scores of bfloat16 would make ties of near ones.
        return logits_BLE.to(torch.promote_types(dtype, torch.float32))


class _Router(Module):
    """Mixin before the host's router."""

    counts_E: Tensor
    sums_S: Tensor

    def _set_up(self, config) -> None:
        self.settings: Router = config.settings
        self.balance: Balance = config.balance
        self._routed_experts = self.num_experts - self.settings.zero_computation_experts
        self.masked_by = TokenMask()
        self.groups = Groups(self.balance.scope == "sequence")
        self.gate.settings = self.settings
        self.gate.temperature = None
        self.gate.is_counted = False  # whether somebody is told of logits that are not finite
        self.step = 1
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64)
        self.register_buffer("counts_E", counts_E, persistent=False)
        self.register_buffer("sums_S", torch.zeros(len(SUMS)), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.counts_E.device
        self.counts_E = torch.zeros_like(self.counts_E, device=device)
        self.sums_S = torch.zeros_like(self.sums_S, device=device)
        schedule = self.settings.temperature
        if not schedule.is_constant:
            self.gate.temperature = torch.tensor(value_at(schedule, 1), device=device)
        elif schedule.end != 1:
            self.gate.temperature = schedule.end

    def at_step(self, step: int) -> None:
        """Move what is scheduled to its value in training step ``step``."""
        self.step = step
        schedule = self.settings.temperature
        if not schedule.is_constant:
            self.gate.temperature.fill_(value_at(schedule, step))

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the host's: weights_BLK, ids_BLK and scores_BLE.

        Device syncs: those of sinkhorn, in training.
        """
        weights_BLK, ids_BLK, scores_BLE = super().forward(x_BLD, expert_bias_E)
        logits_BLE, self.gate.logits_BLE = self.gate.logits_BLE, None
        mask_BL = self.masked_by.of(local(scores_BLE))
        if self.settings.routing == "balanced":
            weights_BLK, ids_BLK = self._balanced(weights_BLK, ids_BLK)
        elif self.settings.routing == "sinkhorn" and self.training:
            weights_BLK, ids_BLK = self._by_sinkhorn(scores_BLE, mask_BL)
        if self.training:
            loss = self._loss(logits_BLE, scores_BLE, ids_BLK, mask_BL)
            if self.balance.has_losses and torch.is_grad_enabled():
                weights_BLK = inject(weights_BLK, loss / self.groups.copies)
        return weights_BLK, ids_BLK, scores_BLE

    def _balanced(self, weights_BLK: Tensor, ids_BLK: Tensor) -> tuple[Tensor, Tensor]:
        ids_TK = ids_BLK.flatten(0, -2)
        T, K = ids_TK.shape
        first, E = self.settings.skip_first_n_experts, self.num_experts
        even_TK = balanced_experts(T, K, E, first=first, device=ids_TK.device)
        weights_TK = torch.full_like(weights_BLK, self.route_scale / K).flatten(0, -2)
        if self.settings.noise:
            even_TK, weights_TK = perturbed(
                even_TK, weights_TK, noise=self.settings.noise, E=E, first=first
            )
        return weights_TK.view_as(weights_BLK), even_TK.view_as(ids_BLK)

    def _by_sinkhorn(self, scores_BLE: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        plan_TE = sinkhorn(
            scores_BLE.detach().flatten(0, -2).float(),
            mask_BL.flatten(),
            self.settings.sinkhorn_tolerance,
            self.settings.sinkhorn_iterations,
        )
        plan_BLE = plan_TE.view_as(scores_BLE)
        if self.num_expert_groups is not None:
            plan_BLE = self._get_node_limited_routing_scores(plan_BLE)
        ids_BLK = plan_BLE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_BLK = scores_BLE.gather(-1, ids_BLK)
        if self.route_norm:
            weights_BLK = weights_BLK / (weights_BLK.sum(-1, keepdim=True) + 1e-20)
        return weights_BLK * self.route_scale, ids_BLK

    def _loss(
        self, logits_BLE: Tensor, scores_BLE: Tensor, ids_BLK: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """The scaled balance losses of this microbatch; counts on the way."""
        share = self.groups.share
        logits_GNE, scores_GNE, ids_GNK, mask_GN1 = map(
            self._in_groups, (logits_BLE, scores_BLE, ids_BLK, mask_BL.unsqueeze(-1))
        )
        mask_GN = mask_GN1.squeeze(-1)
        K = ids_GNK.shape[-1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.balance.has_losses):
            p_GNE = losses.probabilities(scores_GNE, mask_GN)
            n_G = losses.tokens_in_group(mask_GN, share)
            counts_GE = losses.assignments(ids_GNK, mask_GN, self.num_experts)
            f_GE = share(counts_GE) / (n_G * K).unsqueeze(-1)
            if self.settings.zero_computation_experts:
                f_GE = losses.merged_null_share(f_GE, self._routed_experts)
            P_GE = losses.mean_probability(p_GNE, mask_GN, n_G, share)
            of_each_L = self.groups.weight * torch.stack(
                [
                    losses.switch_loss(f_GE, P_GE).sum(),
                    losses.mse_loss(P_GE).sum(),
                    losses.z_loss(logits_GNE, mask_GN, n_G, share).sum(),
                ]
            )
        self._count(p_GNE, logits_GNE, mask_GN, counts_GE, of_each_L)
        balance = self.balance
        return (
            balance.aux_loss * of_each_L[0]
            + balance.mse_loss * of_each_L[1]
            + balance.z_loss * of_each_L[2]
        )

    def _in_groups(self, values_BLX: Tensor) -> Tensor:
        values_BLX = local(values_BLX)
        if values_BLX.dim() == 2:  # [T, X]
            values_BLX = values_BLX.unflatten(0, (-1, self.groups.length))
        return losses.in_groups(values_BLX, by_sequence=self.groups.by_sequence)

    @torch.no_grad()
    def _count(
        self,
        p_GNE: Tensor,
        logits_GNE: Tensor,
        mask_GN: Tensor,
        counts_GE: Tensor,
        of_each_L: Tensor,
    ) -> None:
        top1_GN, best_GN = p_GNE.max(-1)
        second_GN = p_GNE.scatter(-1, best_GN.unsqueeze(-1), 0).amax(-1)
        of_tokens_GN3 = torch.stack([torch.ones_like(top1_GN), top1_GN, top1_GN - second_GN], -1)
        of_tokens_3 = torch.where(mask_GN.unsqueeze(-1), of_tokens_GN3, 0).sum((0, 1))
        not_finite_1 = (~logits_GNE.isfinite().all(-1) & mask_GN).sum().float().view(1)
        # A group's loss is known to all of its ranks: each counts its part.
        part_L = of_each_L / self.groups.ranks
        new_S = torch.cat([of_tokens_3, part_L, not_finite_1])
        count(self.counts_E, self.sums_S, counts_GE.sum(0), new_S)


@cache
def _router_like(host_class: type[TokenChoiceTopKRouter]) -> type[TokenChoiceTopKRouter]:
    class RoutedBySettings(_Router, host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            settings: Router = field(default_factory=Router)
            balance: Balance = field(default_factory=Balance)

        def __init__(self, config: Config):
            super().__init__(config)
            self._set_up(config)

    return named_after(RoutedBySettings, host_class)


def routed(config: TokenChoiceTopKRouter.Config, settings: Router, balance: Balance) -> Any:
    """The config of the same router with the flavor's settings."""
    gate = derive(config.gate, mixed(type(config.gate)._owner, _Gate).Config)
    target = _router_like(type(config)._owner)
    return derive(config, target.Config, gate=gate, settings=settings, balance=balance)


def moe_layers(model_parts: Any) -> dict[int, Any]:
    """Layer number -> its MoE with a router of ours, of all parts of a model that this rank has."""
    return {
        int(name): block.moe
        for part in model_parts
        for name, block in part.layers.items()
        if getattr(block, "moe_enabled", False) and isinstance(block.moe.router, _Router)
    }
