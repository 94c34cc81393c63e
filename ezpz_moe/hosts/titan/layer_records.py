"""Records of layers, from what their routers and experts have counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ezpz_moe.config.routing_schema import Balance, reported_loss
from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.titan.row_figures import row_figures
from ezpz_moe.routing.counters import SUMS
from ezpz_moe.telemetry.record import LayerRecord


def routed(counts: Sequence[torch.Tensor], routers: Sequence[Any]) -> list[torch.Tensor]:
    """Return each layer's counts without those of zero-computation experts, which come last."""
    return [each[: router.routed_experts] for each, router in zip(counts, routers, strict=True)]


def counted_layer(
    number: int,
    moe: Any,
    counts_E: list[int],
    sums_S: list[float],
    rows: Sequence[list[int]],
    more: Mapping[str, Any],
) -> tuple[LayerRecord, float]:
    """Return the record of a layer whose rows were counted, with its tokens that are not finite.

    Args:
        number: the layer's.
        moe: the layer.
        counts_E: assignments, of all ranks.
        sums_S: one for each of ``SUMS`` and the experts' probabilities, of all ranks.
        rows: what :func:`.row_figures` takes.
        more: fields of the record that are known.
    """
    figures = row_figures(
        moe,
        *rows,
        counted=sum(counts_E[: moe.router.routed_experts]),
        of_padding=round(sums_S[SUMS.index("of_padding")]),
    )
    return layer_record(number, moe, counts_E, sums_S, {**figures, **more})


def layer_record(
    number: int,
    moe: Any,
    counts_E: list[int],
    sums_S: list[float],
    more: Mapping[str, Any],
) -> tuple[LayerRecord, float]:
    """Return the record of a layer, with its tokens that are not finite; as above."""
    total = dict(zip(SUMS, sums_S[: len(SUMS)], strict=True))
    tokens, router, bias_E = total["tokens"], moe.router, moe.expert_bias_E
    real = router.routed_experts
    losses, scaled_losses = _losses(router.balance, total)
    record = LayerRecord(
        layer=number,
        tokens=round(tokens),
        counts_E=tuple(counts_E[:real]),
        zero_counts_Z=_not_computed(router, counts_E, round(tokens)),
        top1_probability=total["top1_probability"] / max(tokens, 1),
        margin=total["margin"] / max(tokens, 1),
        bias_norm=None if bias_E is None else float(local(bias_E).norm()),
        losses=losses,
        scaled_losses=scaled_losses,
        probabilities_E=tuple(_short(p / max(tokens, 1)) for p in sums_S[len(SUMS) :][:real]),
        **more,
    )
    return record, total["not_finite"]


def _not_computed(router: Any, counts_E: list[int], tokens: int) -> tuple[int, ...]:
    """Return the choices of each zero-computation expert, or those of no expert at all."""
    if router.settings.has_unchosen:
        return (tokens * router.num_experts - sum(counts_E),)
    return tuple(counts_E[router.routed_experts :])


def _short(value: float) -> float:
    """Round to four digits: a record has a probability of every layer and expert."""
    return float(f"{value:.4g}")


def _losses(
    balance: Balance, total: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the losses by their names, without and with coefficients: means over their groups."""
    losses, scaled = {}, {}
    of_scopes = balance.of_scopes
    for scope, coefficients in of_scopes.items():
        for loss in balance.computed:
            name = reported_loss(loss, scope, of_scopes)
            # The weights of the groups of a training step add up to 1. Validation has other steps.
            losses[name] = total[f"{loss}_{scope}"] / (total[f"weight_{scope}"] or 1)
            scaled[name] = coefficients.get(loss, 0.0) * losses[name]
    return losses, scaled
