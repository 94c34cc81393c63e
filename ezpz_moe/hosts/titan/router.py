"""Extend the host's router and gate by a flavor's ``[router]`` and ``[balance]``.

Scores, groups, bias, norm and scale stay the host's own, but for scores that it does not know.
The gate is a subclass that changes its
input and its logits. The router is a subclass that may choose other experts, adds the gradient of
the balance losses, and counts. What each option computes is in :mod:`ezpz_moe.routing`, so a new
one needs nothing here.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import TokenChoiceTopKRouter
from torchtitan.protocols.module import Module

from ezpz_moe.config.routing_schema import LOSSES, SCOPES, Balance, Router, Scope
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.titan.groups import Groups, TokenMask
from ezpz_moe.hosts.titan.learned_scale import add_scale, lay_out_scale
from ezpz_moe.hosts.titan.mixed import mixed, named_after
from ezpz_moe.hosts.titan.similar import UNTOLD, averaged_scores
from ezpz_moe.routing import losses
from ezpz_moe.routing.activated import every_active
from ezpz_moe.routing.anchor import Anchor, anchor_loss
from ezpz_moe.routing.assignment import (
    HostRules,
    chosen,
    limited_to_groups,
    scores_of,
    weights_of,
)
from ezpz_moe.routing.balance import first_value, inject, value_at
from ezpz_moe.routing.choices import count_pairs, count_sent
from ezpz_moe.routing.counters import SUMS, count
from ezpz_moe.routing.gate import gate_input, gate_logits, gate_product
from ezpz_moe.routing.keeping import keep
from ezpz_moe.routing.neighbours import Neighbours


class _Gate(Module):
    """Mixin before the host's linear gate."""

    def forward(self, input: Tensor) -> Tensor:
        settings: Router = self.settings
        logits_BLE = self.product(gate_input(input, settings, training=self.training))
        now = {key: getattr(self, key) for key in self.scheduled}
        # Kept for the router: the host's forward returns scores, and some losses need logits.
        self.raw_BLE, self.logits_BLE = gate_logits(
            logits_BLE, settings, now, is_counted=self.is_counted, scale_E=self.scale_E
        )
        return self.logits_BLE

    def product(self, input: Tensor) -> Tensor:
        """Return the logits before all that is done to them; a subclass may add to them."""
        logits_BLE = gate_product(input, self.weight, self.bias, self.settings)
        return super().forward(input) if logits_BLE is None else logits_BLE

    def parallelize(self, parallel_dims: Any) -> None:
        lay_out_scale(self)
        super().parallelize(parallel_dims)


class _Router(Module):
    """Mixin before the host's router."""

    counts_E: Tensor
    sums_S: Tensor
    kept_2: Tensor
    sent_P: Tensor
    pairs_EE: Tensor
    sampled_1: Tensor

    def _set_up(self, config) -> None:
        self.settings: Router = config.settings
        self.balance: Balance = config.balance
        self._group_score: str = config.group_score
        self.routed_experts = self.num_experts - self.settings.zero_computation_experts
        self.masked_by = TokenMask()
        self.coefficients = self.balance.of_scopes
        self._has_losses = any(self.coefficients.values())
        self.groups = {scope: Groups(scope == "sequence") for scope in self.coefficients}
        self.gate.settings = self.settings
        self.gate.scale_E = None
        if self.settings.learned_scale:
            add_scale(self.gate, self.num_experts)
        # A schedule's value is an attribute of the gate, with the key's name: a float until
        # _init_self_buffers knows the device.
        self.gate.scheduled = tuple(self.settings.schedules)
        for key, schedule in self.settings.schedules.items():
            setattr(self.gate, key, value_at(schedule, 1))
        # A run that dumps says so: with the layer's number, and this rank's tokens in a step.
        self.is_kept, self.layer, self.tokens_of_step = False, 0, 0
        # So do one whose tokens go once to each of so many ranks, and one that samples pairs.
        self.ranks, self.stride = 0, 0
        self.anchor: Anchor | None = None  # set where some experts learn
        self.positions: Any = UNTOLD  # of this microbatch, from the layer's block
        self.gate.is_counted = False  # whether telemetry reports logits that are not finite
        self.step = 1
        # Not persistent: a checkpoint must have the same keys as the host's own model. On the
        # router, because the host asks modules with a sharding_config about every buffer, and it
        # has none. With their dtypes, because the host builds the model in training.dtype, and a
        # sum in bfloat16 stands still at 256.
        counts_E = torch.zeros(self.num_experts, dtype=torch.int64)
        self.register_buffer("counts_E", counts_E, persistent=False)
        sums_S = torch.zeros(len(SUMS) + self.num_experts, dtype=torch.float32)
        self.register_buffer("sums_S", sums_S, persistent=False)
        # The same of validation: nothing of it may get into a record or a bias of training.
        self.register_buffer("val_counts_E", counts_E.clone(), persistent=False)
        self.register_buffer("val_sums_S", sums_S.clone(), persistent=False)
        kept_2 = torch.zeros(2, dtype=torch.int64)
        self.register_buffer("kept_2", kept_2, persistent=False)
        for name in ("sent_P", "sampled_1"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("pairs_EE", torch.zeros(0, 0, dtype=torch.int32), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.counts_E.device
        self.counts_E = torch.zeros_like(self.counts_E, device=device)
        self.sums_S = torch.zeros_like(self.sums_S, device=device)
        self.val_counts_E = torch.zeros_like(self.counts_E)
        self.val_sums_S = torch.zeros_like(self.sums_S)
        self.kept_2 = torch.zeros_like(self.kept_2, device=device)
        self.kept_2[0] = self.layer
        self.sent_P = self.sent_P.new_zeros(self.ranks, device=device)
        if self.stride:
            self.sampled_1 = self.sampled_1.new_zeros(1, device=device)
            self.pairs_EE = self.pairs_EE.new_zeros((self.routed_experts,) * 2, device=device)
        for key, schedule in self.settings.schedules.items():
            setattr(self.gate, key, first_value(schedule, device))

    def at_step(self, step: int) -> None:
        """Set everything scheduled to its value at training step ``step``."""
        self.step = step
        for key, schedule in self.settings.schedules.items():
            if not schedule.is_constant:
                getattr(self.gate, key).fill_(value_at(schedule, step))

    def forward(
        self, x_BLD: Tensor, expert_bias_E: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Route as the host does: return weights_BLK, ids_BLK and scores_BLE.

        Device syncs: those of sinkhorn, in training.
        """
        # The host's forward knows two functions, and a token's own scores.
        is_the_hosts = self.score_func in ("softmax", "sigmoid")
        is_the_hosts &= not self.settings.similarity.strength
        route = super().forward if is_the_hosts else self._route
        weights_BLK, ids_BLK, scores_BLE = route(x_BLD, expert_bias_E)
        # Taken from the gate at once: it would keep the graph of this microbatch alive.
        raw_BLE, logits_BLE = self.gate.raw_BLE, self.gate.logits_BLE
        self.gate.raw_BLE = self.gate.logits_BLE = None
        mask_BL = self.masked_by.of(local(scores_BLE))
        weights_BLK, ids_BLK = chosen(
            weights_BLK,
            ids_BLK,
            scores_BLE,
            mask_BL,
            self.settings,
            self._rules,
            training=self.training,
        )
        # As its authors do, without the scale, which may be negative.
        shared_BLE = raw_BLE.relu() if self.settings.has_unchosen else scores_BLE
        # Whoever reports reports validation too.
        if self.training or self.gate.is_counted:
            by_scores = self._counts_scores(expert_bias_E)
            tokens = (raw_BLE, logits_BLE, shared_BLE, ids_BLK, mask_BL)
            of_scopes = self._losses(*tokens, by_scores)
            if self.training and self._has_losses and torch.is_grad_enabled():
                weights_BLK = inject(weights_BLK, losses.weighted(of_scopes, self.coefficients))
        if self.training and self.anchor and torch.is_grad_enabled():
            weights_BLK = inject(weights_BLK, self._anchored(self.anchor, shared_BLE, mask_BL))
        return weights_BLK, ids_BLK, scores_BLE

    def _route(self, x_BLD: Tensor, expert_bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Route as the host does, with scores that it does not know, or averages of them."""
        with torch.autocast(device_type=x_BLD.device.type, dtype=torch.float32):
            logits_BLE = self.gate(x_BLD)
        scores_BLE = scores_of(logits_BLE, self.score_func)
        if self.settings.has_unchosen:
            return every_active(scores_BLE, self._rules)
        if self.settings.similarity.strength:
            positions_BL, self.positions = self.positions, UNTOLD
            scores_BLE = averaged_scores(scores_BLE, x_BLD, positions_BL, self.settings.similarity)
        by_BLE = scores_BLE if expert_bias_E is None else scores_BLE + expert_bias_E
        if self._rules.limited is not None:
            by_BLE = self._rules.limited(by_BLE)
        ids_BLK = by_BLE.topk(self.top_k, dim=-1, sorted=False).indices
        if self._debug_force_load_balance:
            ids_BLK, _ = self._debug_force_load_balance_routing(scores_BLE)
        return weights_of(scores_BLE, ids_BLK, self._rules), ids_BLK, scores_BLE

    @property
    def _rules(self) -> HostRules:
        limited = None if self.num_expert_groups is None else self._get_node_limited_routing_scores
        return HostRules(self.route_norm, self.route_scale, limited)

    def _get_node_limited_routing_scores(self, scores_BLE: Tensor) -> Tensor:
        """Replace the host's method, which ranks groups in one way and needs two experts in each.

        With the host's ranking it chooses the same groups, ties included.
        """
        return limited_to_groups(
            scores_BLE,
            groups=self.num_expert_groups,
            limited=self.num_limited_groups,
            group_score=self._group_score,
            top_k=self.top_k,
        )

    def _counts_scores(self, expert_bias_E: Tensor | None) -> bool:
        """Return whether the Switch loss counts the highest scores, not where the tokens go."""
        # A choice that the scores have no part in is not theirs to balance.
        if self.settings.routing != "topk" or self._debug_force_load_balance:
            return False
        asked = self.balance.aux_loss_choice
        return expert_bias_E is not None if asked is None else asked == "scores"

    def _losses(
        self,
        raw_BLE: Tensor,
        logits_BLE: Tensor,
        scores_BLE: Tensor,
        ids_BLK: Tensor,
        mask_BL: Tensor,
        by_scores: bool,
    ) -> dict[Scope, Tensor]:
        """Return of_each_L of this microbatch by scope, to be added up; count on the way."""
        raw_BLE, logits_BLE, scores_BLE, ids_BLK, mask_BL1 = map(
            self._in_sequences, (raw_BLE, logits_BLE, scores_BLE, ids_BLK, mask_BL.unsqueeze(-1))
        )
        mask_BL = mask_BL1.squeeze(-1)
        counted_BLK = losses.counted_choice(ids_BLK, scores_BLE, by_scores=by_scores)
        of_scopes: dict[Scope, Tensor] = {}
        # Without losses this still runs, because telemetry shows them, but needs no graph.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._has_losses):
            p_BLE = losses.probabilities(scores_BLE, mask_BL)
            for scope, groups in self.groups.items():
                in_groups = partial(losses.in_groups, by_sequence=groups.by_sequence)
                of_each_L = losses.of_microbatch(
                    in_groups(logits_BLE),
                    in_groups(p_BLE),
                    in_groups(counted_BLK),
                    in_groups(mask_BL),
                    groups.share,
                    routed_experts=self.routed_experts,
                    neighbours=Neighbours(in_groups(raw_BLE), mask_BL.shape[1], self.balance.chunk),
                    computed=self.balance.computed,
                )
                of_scopes[scope] = groups.weight * of_each_L
        self._count(p_BLE, logits_BLE, ids_BLK, mask_BL, of_scopes)
        # Ranks with the same tokens would each add the whole loss.
        return {scope: of / self.groups[scope].copies for scope, of in of_scopes.items()}

    def _anchored(self, anchor: Anchor, scores_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the anchor's loss of this microbatch, to be added up."""
        scores_BLE, mask_BL1 = map(self._in_sequences, (scores_BLE, mask_BL.unsqueeze(-1)))
        p_BLE = losses.probabilities(scores_BLE, mask_BL1.squeeze(-1))
        groups = next(iter(self.groups.values()))  # of any scope: it is a mean over tokens
        p_GNE, mask_GN = (
            losses.in_groups(each, by_sequence=groups.by_sequence)
            for each in (p_BLE, mask_BL1.squeeze(-1))
        )
        loss = anchor_loss(p_GNE, mask_GN, anchor.trained_E, groups.share)
        return anchor.coefficient * groups.weight / groups.copies * loss

    def _in_sequences(self, values_BLX: Tensor) -> Tensor:
        values_BLX = local(values_BLX)
        # Since August 2026 the host folds sequences into tokens. Only a scope of sequences and
        # losses of neighbours need to know where they end.
        if values_BLX.dim() == 2:  # [T, X]
            length = values_BLX.shape[0]
            if "sequence" in self.groups or self.balance.compares_neighbours:
                length = next(iter(self.groups.values())).length
            values_BLX = values_BLX.unflatten(0, (-1, length))
        return values_BLX

    @torch.no_grad()
    def _count(
        self,
        p_BLE: Tensor,
        logits_BLE: Tensor,
        ids_BLK: Tensor,
        mask_BL: Tensor,
        of_scopes: dict[Scope, Tensor],
    ) -> None:
        top1_BL, best_BL = p_BLE.max(-1)
        # Not topk(2): selective checkpointing would save its result, as it does for the choices.
        second_BL = p_BLE.scatter(-1, best_BL.unsqueeze(-1), 0).amax(-1)
        # In the order of SUMS: these three, the losses and their weights, the last two.
        of_tokens_BL3 = torch.stack([torch.ones_like(top1_BL), top1_BL, top1_BL - second_BL], -1)
        of_tokens_3 = torch.where(mask_BL.unsqueeze(-1), of_tokens_BL3, 0).sum((0, 1))
        none_L = of_tokens_3.new_zeros(len(LOSSES))
        # All ranks of a group know its loss, so each counts only its part.
        parts_CL = [
            of_scopes[scope] / self.groups[scope].ranks if scope in of_scopes else none_L
            for scope in SCOPES
        ]
        weights_C1 = [
            of_tokens_3.new_full((1,), self._weight(scope, mask_BL.shape[0])) for scope in SCOPES
        ]
        not_finite_1 = (~logits_BLE.isfinite().all(-1) & mask_BL).sum().float().view(1)
        is_of_padding_BLK = (ids_BLK < self.routed_experts) & ~mask_BL.unsqueeze(-1)
        of_padding_1 = is_of_padding_BLK.sum().float().view(1)
        last_2 = (not_finite_1, of_padding_1)
        new_S = torch.cat([of_tokens_3, *parts_CL, *weights_C1, *last_2, p_BLE.sum((0, 1))])
        chosen_E = losses.assignments(ids_BLK, mask_BL, self.num_experts).sum(0)
        ids_TK, p_TE, mask_T = (each.flatten(0, 1) for each in (ids_BLK, p_BLE, mask_BL))
        if self.is_kept and self.training:
            keep(self.kept_2, ids_TK, p_TE, mask_T)
        if self.ranks and self.training:
            count_sent(self.sent_P, ids_TK, mask_T, self.routed_experts)
        if self.stride and self.training:
            count_pairs(self.pairs_EE, self.sampled_1, ids_TK, mask_T, self.stride)
        if self.training:
            count(self.counts_E, self.sums_S, chosen_E, new_S)
        else:
            count(self.val_counts_E, self.val_sums_S, chosen_E, new_S)

    def _weight(self, scope: Scope, sequences: int) -> float:
        """Return the weight of a microbatch's groups together, this rank's part of it."""
        groups = self.groups.get(scope)
        if groups is None:
            return 0.0
        return groups.weight * (sequences if groups.by_sequence else 1) / groups.ranks


@cache
def _router_like(host_class: type[TokenChoiceTopKRouter]) -> type[TokenChoiceTopKRouter]:
    class RoutedBySettings(_Router, host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            settings: Router = field(default_factory=Router)
            balance: Balance = field(default_factory=Balance)
            group_score: str = "top2_sum"

        def __init__(self, config: Config):
            super().__init__(config)
            self._set_up(config)

    return named_after(RoutedBySettings, host_class)


def routed(
    config: TokenChoiceTopKRouter.Config,
    settings: Router,
    balance: Balance,
    group_score: str = "top2_sum",
) -> Any:
    """Return the config of the same router with the flavor's settings."""
    gate = derive(config.gate, mixed(type(config.gate)._owner, _Gate).Config)
    target = _router_like(type(config)._owner)
    keeps_score = settings.keep_top1_score and config.top_k == 1
    return derive(
        config,
        target.Config,
        gate=gate,
        route_norm=config.route_norm and not keeps_score,
        # Its scores are the activations themselves.
        score_func="identity" if settings.has_unchosen else config.score_func,
        settings=settings,
        balance=balance,
        group_score=group_score,
    )


def moe_layers(model_parts: Any) -> dict[int, Any]:
    """Return layer number -> its MoE with a router of ours, from all model parts on this rank."""
    return {
        int(name): block.moe
        for part in model_parts
        for name, block in part.layers.items()
        if getattr(block, "moe_enabled", False) and isinstance(block.moe.router, _Router)
    }
