"""Extend the host's router and gate by a flavor's ``[router]`` and ``[balance]``.

Scores, groups, bias, norm and scale stay the host's own. The gate is a subclass that changes its
input and its logits. The router is a subclass that may choose other experts, adds the gradient of
the balance losses, and counts.

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
    """Which tokens of the current microbatch count; set before the model's forward."""

    mask_BL: Tensor | None = None

    def of(self, scores_BLE: Tensor) -> Tensor:
        """Return mask_BL, bool; all tokens count if nothing says otherwise.

        Raises:
            ValueError: the mask has another shape or dtype than the router's tokens need.
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
    """What a balance loss is averaged over.

    Attributes:
        by_sequence: whether a group is one sequence instead of all tokens.
        length: tokens per sequence, for a host with tensors that do not show it.
        meshes: device meshes that a group is spread over.
        weight: weight of a group in the mean over all groups of a training step.
        copies: ranks that compute the same group while the host adds up their gradients.
    """

    by_sequence: bool = True
    length: int = 0
    meshes: tuple[Any, ...] = ()
    weight: float = 1.0
    copies: int = 1

    def share(self, addend: Tensor) -> Tensor:
        """Return the sum over a group's ranks, with the gradient of this rank's own addend."""
        if not self.meshes:
            return addend
        # Without gradient through the collective: the host adds up the gradients of all ranks
        # anyway, and each rank contributes that of its own tokens.
        total = addend.detach()
        for mesh in self.meshes:
            total = collectives.all_reduce(total, "sum", mesh.get_group())
        return addend + (total - addend.detach())

    @property
    def ranks(self) -> int:
        """Number of ranks that share a group."""
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
        # Telemetry stops the run if logits are not finite. Without it, or if an activation hides an
        # infinity from the counters, the loss has to become NaN.
        if not (self.is_counted and settings.activation == "identity"):
            logits_BLE = losing_infinities(logits_BLE)
        # Kept for the router: the host's forward returns scores, and the z-loss needs logits.
        self.logits_BLE = activated(logits_BLE, settings.activation)
        return self.logits_BLE

    def _project(self, input: Tensor) -> Tensor:
        if self.settings.gate_precision is None:
            return super().forward(input)
        dtype = getattr(torch, self.settings.gate_precision)
        bias_E = None if self.bias is None else self.bias.to(dtype)
        # autocast would turn the product back into bfloat16.
        with torch.autocast(input.device.type, enabled=False):
            logits_BLE = F.linear(input.to(dtype), self.weight.to(dtype), bias_E)
        # Only the product has that precision: bfloat16 scores would tie where they are merely
        # close.
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
        self.gate.is_counted = False  # whether telemetry reports logits that are not finite
        self.step = 1
        # Not persistent: a checkpoint must have the same keys as the host's own model. On the
        # router, because the host asks modules with a sharding_config about every buffer, and it
        # has none.
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
        """Set everything scheduled to its value at training step ``step``."""
        self.step = step
        schedule = self.settings.temperature
        if not schedule.is_constant:
            self.gate.temperature.fill_(value_at(schedule, step))

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route as the host does: return weights_BLK, ids_BLK and scores_BLE.

        Device syncs: those of sinkhorn, in training.
        """
        weights_BLK, ids_BLK, scores_BLE = super().forward(x_BLD, expert_bias_E)
        # Taken from the gate at once: it would keep the graph of this microbatch alive.
        logits_BLE, self.gate.logits_BLE = self.gate.logits_BLE, None
        mask_BL = self.masked_by.of(local(scores_BLE))
        if self.settings.routing == "balanced":
            weights_BLK, ids_BLK = self._balanced(weights_BLK, ids_BLK)
        # In training only: a plan depends on the other tokens of the batch, which at inference
        # would include later ones.
        elif self.settings.routing == "sinkhorn" and self.training:
            weights_BLK, ids_BLK = self._by_sinkhorn(scores_BLE, mask_BL)
        if self.training:
            loss = self._loss(logits_BLE, scores_BLE, ids_BLK, mask_BL)
            if self.balance.has_losses and torch.is_grad_enabled():
                # Ranks with the same tokens would each add the whole loss.
                weights_BLK = inject(weights_BLK, loss / self.groups.copies)
        return weights_BLK, ids_BLK, scores_BLE

    def _balanced(self, weights_BLK: Tensor, ids_BLK: Tensor) -> tuple[Tensor, Tensor]:
        ids_TK = ids_BLK.flatten(0, -2)
        T, K = ids_TK.shape
        first, E = self.settings.skip_first_n_experts, self.num_experts
        even_TK = balanced_experts(T, K, E, first=first, device=ids_TK.device)
        # Constant weights: a balanced choice says nothing about the token, so no gradient should
        # reach the gate through it.
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
        # The host limits groups by its own method, so it is applied to the plan as if to scores.
        if self.num_expert_groups is not None:
            plan_BLE = self._get_node_limited_routing_scores(plan_BLE)
        ids_BLK = plan_BLE.topk(self.top_k, dim=-1, sorted=False).indices
        # The plan only chooses. Weights come from the scores, which have a gradient.
        weights_BLK = scores_BLE.gather(-1, ids_BLK)
        if self.route_norm:
            weights_BLK = weights_BLK / (weights_BLK.sum(-1, keepdim=True) + 1e-20)
        return weights_BLK * self.route_scale, ids_BLK

    def _loss(
        self, logits_BLE: Tensor, scores_BLE: Tensor, ids_BLK: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """Return the scaled balance losses of this microbatch, and count on the way."""
        share = self.groups.share
        logits_GNE, scores_GNE, ids_GNK, mask_GN1 = map(
            self._in_groups, (logits_BLE, scores_BLE, ids_BLK, mask_BL.unsqueeze(-1))
        )
        mask_GN = mask_GN1.squeeze(-1)
        K = ids_GNK.shape[-1]
        # Without losses this still runs, because telemetry shows them, but needs no graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.balance.has_losses):
            p_GNE = losses.probabilities(scores_GNE, mask_GN)
            n_G = losses.tokens_in_group(mask_GN, share)
            counts_GE = losses.assignments(ids_GNK, mask_GN, self.num_experts)
            f_GE = share(counts_GE) / (n_G * K).unsqueeze(-1)
            if self.settings.zero_computation_experts:
                # Which zero-computation expert a token takes does not matter, so the loss must not
                # favour one.
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
        # Since August 2026 the host folds sequences into tokens.
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
        # Not topk(2): selective checkpointing would save its result, as it does for the choices.
        second_GN = p_GNE.scatter(-1, best_GN.unsqueeze(-1), 0).amax(-1)
        # In the order of SUMS: these three, then the losses, then the logits that are not finite.
        of_tokens_GN3 = torch.stack([torch.ones_like(top1_GN), top1_GN, top1_GN - second_GN], -1)
        of_tokens_3 = torch.where(mask_GN.unsqueeze(-1), of_tokens_GN3, 0).sum((0, 1))
        not_finite_1 = (~logits_GNE.isfinite().all(-1) & mask_GN).sum().float().view(1)
        # All ranks of a group know its loss, so each counts only its part.
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
    """Return the config of the same router with the flavor's settings."""
    gate = derive(config.gate, mixed(type(config.gate)._owner, _Gate).Config)
    target = _router_like(type(config)._owner)
    return derive(config, target.Config, gate=gate, settings=settings, balance=balance)


def moe_layers(model_parts: Any) -> dict[int, Any]:
    """Return layer number -> its MoE with a router of ours, from all model parts on this rank."""
    return {
        int(name): block.moe
        for part in model_parts
        for name, block in part.layers.items()
        if getattr(block, "moe_enabled", False) and isinstance(block.moe.router, _Router)
    }
