"""What becomes of each layer's experts. Legend: E = routed experts of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ezpz_moe.tools.analysis.attribution import attribution
from ezpz_moe.tools.analysis.record import Recording
from ezpz_moe.tools.analysis.similarity import cosines
from ezpz_moe.tools.pruning import merging
from ezpz_moe.tools.pruning.choice import least_alike, most_important
from ezpz_moe.tools.pruning.constants import Constant
from ezpz_moe.tools.pruning.merging import Merged
from ezpz_moe.tools.pruning.whole import Whole

Measure = Literal["frequency", "weight", "cosine"]


@dataclass(frozen=True)
class Layer:
    """What becomes of a layer.

    Attributes:
        kept: numbers of the experts that stay, ascending.
        num_experts: how many there were, E.
        tokens: the share of a text's choices that the removed ones had; None without a text.
        weight: the same of the weights that routers gave.
        merged: removed experts that were added to others.
        constants: in the place of the removed ones, in their order; empty if there are none.
    """

    kept: tuple[int, ...]
    num_experts: int
    tokens: float | None
    weight: float | None
    merged: tuple[Merged, ...]
    constants: tuple[Constant, ...] = ()

    @property
    def removed(self) -> tuple[int, ...]:
        """Numbers of the experts that go, ascending."""
        return tuple(sorted(set(range(self.num_experts)) - set(self.kept)))

    @property
    def reproduced(self) -> float | None:
        """The share of the removed ones' outputs, in squares, that the constants have."""
        output = sum(each.output for each in self.constants)
        return 1 - sum(each.missing for each in self.constants) / output if output else None


def decide(
    whole: Whole, name: str, keep: int, by: Measure, merge: bool, recording: Recording | None
) -> Layer:
    """Decide what becomes of a layer.

    Args:
        whole: the model.
        name: the layer's, such as "layers.3".
        keep: how many of its experts stay.
        by: what decides which.
        merge: whether to add those that go to those that stay.
        recording: what the model does with a text; needed unless ``by`` is "cosine".
    """
    E, groups = whole.rows.num_experts[name], whole.routers[name].num_expert_groups or 1
    tokens_E = _shares(recording, name, "share_of_tokens", E) if recording else None
    weight_E = _shares(recording, name, "share_of_weight", E) if recording else None
    alike_EE = None
    if by == "cosine" or merge:
        alike_EE = cosines(whole.read(stack) for stack in whole.stacks(name))
    if by == "cosine":
        assert alike_EE is not None
        kept = least_alike(alike_EE, keep, groups)
    else:
        amounts_E = tokens_E if by == "frequency" else weight_E
        assert amounts_E is not None
        kept = most_important(amounts_E, keep, groups)
    merged: list[Merged] = []
    if merge:
        assert alike_EE is not None
        # Without a text all experts count the same.
        part_E = (weight_E if by == "weight" else tokens_E) or [1.0] * E
        merged = _with_orders(whole, name, merging.where_to(kept, alike_EE, part_E))
    return Layer(
        kept=tuple(kept),
        num_experts=E,
        tokens=_lost(tokens_E, kept),
        weight=_lost(weight_E, kept),
        merged=tuple(merged),
    )


def _lost(shares_E: Sequence[float] | None, kept: Sequence[int]) -> float | None:
    # Not 1 minus what stays: none is to be exactly none.
    if shares_E is None:
        return None
    return sum(share for e, share in enumerate(shares_E) if e not in set(kept))


def _shares(recording: Recording, layer: str, what: str, experts: int) -> list[float]:
    """Return what each routed expert of a layer has of a text."""
    number = int(layer.rpartition(".")[2])
    found = [getattr(one, what) for one in attribution(recording) if one.layer == number]
    return found[:experts]  # behind them are those without computation


def _with_orders(whole: Whole, layer: str, pairs: Sequence[Merged]) -> list[Merged]:
    """Return the pairs with the orders of their channels, for which each stack is read once."""
    similar = [torch.zeros(()) for _ in pairs]
    for name in whole.stacks(layer):
        stack = {name: whole.read(name)}
        similar = [
            total + merging.similar_channels(stack, pair)
            for total, pair in zip(similar, pairs, strict=True)
        ]
    return [
        dataclasses.replace(pair, order=merging.greedy_order(of))
        for pair, of in zip(pairs, similar, strict=True)
    ]
