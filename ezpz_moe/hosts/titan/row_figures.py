"""What a layer's experts did with the rows that they were given, from what was counted of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ezpz_moe.compute import get_backend
from ezpz_moe.hosts.titan.selector import Selector
from ezpz_moe.hosts.titan.zero_computation import Choices
from ezpz_moe.routing.counters import CHOICES, ROWS
from ezpz_moe.telemetry.figures import use_of_rows


def experts_of(moe: Any) -> Selector | None:
    """Return the layer's experts with their selector, or None if the host's have none."""
    return next((each for each in moe.modules() if isinstance(each, Selector)), None)


def taken_rows(moe: Any, device: torch.device) -> torch.Tensor:
    """Return rows_3, int64: what the layer's experts have counted; reset their counters."""
    experts = experts_of(moe)
    if experts is None or experts.row_counts is None:
        return torch.zeros(len(ROWS), dtype=torch.int64, device=device)
    rows_3 = experts.row_counts.rows_3.clone()
    experts.row_counts.rows_3.zero_()
    return rows_3


def taken_choices(moe: Any, device: torch.device) -> torch.Tensor:
    """Return choices_2, int64: what a capacity has done with the choices; reset its counter."""
    counter = next((each for each in moe.modules() if isinstance(each, Choices)), None)
    if counter is None:
        return torch.zeros(len(CHOICES), dtype=torch.int64, device=device)
    choices_2 = counter.choices_2.clone()
    counter.choices_2.zero_()
    return choices_2


def row_figures(
    moe: Any, rows_3: list[int], choices_2: list[int], *, counted: int, of_padding: int
) -> Mapping[str, float | None]:
    """Return ``padding_waste`` and ``drop_rate``; None for what nobody counted.

    Args:
        moe: the layer.
        rows_3: as :func:`taken_rows`, of all ranks.
        choices_2: as :func:`taken_choices`, of all ranks.
        counted: choices of routed experts by tokens that are not padding.
        of_padding: those by padding tokens.
    """
    given, computed, dropped = rows_3
    made, beyond = choices_2
    backends = _backends(moe)
    computes_each = not any(each.pads or each.drops_tokens for each in backends)
    if computes_each and _dispatches_padding(moe):
        # Nobody counts where every row is a choice that was sent.
        given = computed = counted + of_padding - beyond
    if given:
        use = use_of_rows(given, computed, dropped, counted)
        # What [balance] capacity_factor has left out was never given to the backend.
        return use | {"drop_rate": (beyond + dropped) / made} if made else use
    # Nothing counted means no drops only if the backend cannot drop: otherwise it is unknown.
    if any(each.drops_tokens for each in backends):
        return {"padding_waste": None, "drop_rate": None}
    return {"padding_waste": None, "drop_rate": beyond / made if made else 0.0}


def _backends(moe: Any) -> list[Any]:
    """Return what computes the layer: the backend asked for, and what it has chosen."""
    experts = experts_of(moe)
    if experts is None:
        return []
    asked = get_backend(experts.compute_backend)
    return [asked, *map(get_backend, asked.chosen)]


def _dispatches_padding(moe: Any) -> bool:
    """Return whether some tokens may be padding, and go to experts all the same."""
    is_cut = getattr(moe.routed_experts, "masked_by", None) is not None
    return moe.router.settings.masks_padding and not is_cut
