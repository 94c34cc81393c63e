"""Counters of routers and experts that activation checkpointing does not double.

Recomputation runs a layer a second time, inside the backward pass. The counters then stand still:
the operators below check whether the autograd engine is running.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ezpz_moe.compute import get_backend
from ezpz_moe.config.routing_schema import LOSSES_OF_SCOPES, SCOPES

WEIGHTS_OF_SCOPES = tuple(f"weight_{scope}" for scope in SCOPES)

SUMS = (
    *("tokens", "top1_probability", "margin"),
    *LOSSES_OF_SCOPES,
    *WEIGHTS_OF_SCOPES,
    *("not_finite", "of_padding"),
)
"""What ``sums_S`` adds up: the first three over tokens; the losses over groups, weighted by the
group; these weights, by which a sum of losses becomes their mean; the tokens with a logit that is
not finite; and the choices of routed experts that padding tokens make. A router's has the sum over
tokens of each expert's probability after them."""

ROWS = ("given", "computed", "dropped")
"""What ``rows_3`` adds up: tokens given to experts, rows computed, tokens dropped."""

CHOICES = ("made", "beyond")
"""What ``choices_2`` adds up: choices of routed experts, and those beyond a capacity."""


def apart(joined_N: Tensor, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return views of a tensor that has one row of each layer after the other.

    Layers may have different numbers of experts, and one collective adds up those of all.

    Args:
        joined_N: as ``torch.cat(layers)``.
        layers: for their lengths.
    """
    return joined_N.split([len(each) for each in layers])


# An operator, not plain Python: torch.compile would decide is_recomputation() once, while it
# traces, and build the answer in.
@torch.library.custom_op("ezpz_moe::count", mutates_args=("counts_E", "sums_S"))
def count(counts_E: Tensor, sums_S: Tensor, new_E: Tensor, new_S: Tensor) -> None:
    """Add ``new_E`` to ``counts_E`` and ``new_S`` to ``sums_S``, unless this is a recomputation.

    Args:
        counts_E: int64 assignments to each expert so far.
        sums_S: float32, one for each of ``SUMS``.
        new_E: this microbatch's assignments, any dtype.
        new_S: this microbatch's sums.
    """
    if not is_recomputation():
        counts_E.add_(new_E.to(counts_E.dtype))
        sums_S.add_(new_S.to(sums_S.dtype))


@torch.library.custom_op("ezpz_moe::count_rows", mutates_args=("rows_3",))
def count_rows(
    rows_3: Tensor, num_tokens_per_expert_E: Tensor, num_rows: int, compute_backend: str
) -> None:
    """Add to ``rows_3`` what a backend does with these rows, unless this is a recomputation.

    Opaque to compilers, because a backend may read the counts on the host.

    Args:
        rows_3: int64, one for each of ``ROWS``. Unchanged for a backend that does not say.
        num_tokens_per_expert_E: counts of the experts, any integer dtype.
        num_rows: rows of the experts' input.
        compute_backend: the backend's name, with its options.
    """
    if is_recomputation():
        return
    used_2 = get_backend(compute_backend).rows_used(num_tokens_per_expert_E, num_rows)
    if used_2 is not None:
        given = num_tokens_per_expert_E.sum(dtype=torch.int64)
        rows_3[:1].add_(given)
        rows_3[1:].add_(used_2.to(rows_3.device))


@torch.library.custom_op("ezpz_moe::count_dropped", mutates_args=("choices_2",))
def count_dropped(choices_2: Tensor, is_beyond_TK: Tensor, ids_TK: Tensor, experts: int) -> None:
    """Add what a capacity does with a rank's choices, unless this is a recomputation.

    Args:
        choices_2: int64, one for each of ``CHOICES``.
        is_beyond_TK: bool, the choices that are dropped.
        ids_TK: all choices; those from ``experts`` on are of no expert.
        experts: routed experts.
    """
    if not is_recomputation():
        choices_2.add_(torch.stack([(ids_TK < experts).sum(), is_beyond_TK.sum()]))


def is_recomputation() -> bool:
    """Return whether the autograd engine runs in this thread: forward is then a repeated one.

    torch.utils.checkpoint recognizes a recomputation by the same number.
    """
    # A private function, which `ezpz-moe doctor` checks: torch has no public one.
    return torch._C._current_graph_task_id() != -1
