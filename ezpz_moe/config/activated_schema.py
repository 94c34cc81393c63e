"""What excludes ``routing = "relu"``, its learned scale, and the losses of neighbouring tokens.

The keys are in :mod:`.routing_schema`, the formulas in :mod:`ezpz_moe.routing.activated` and
:mod:`ezpz_moe.routing.neighbours`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

DEFAULT_CHUNK = 64
_ACTIVATION = 'activation = "relu_rmsnorm"'


class Router(Protocol):
    """What is asked of ``[router]``."""

    @property
    def routing(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def learned_scale(self) -> bool: ...


class Balance(Protocol):
    """What is asked of ``[balance]``."""

    @property
    def chunk(self) -> int: ...
    @property
    def computed(self) -> tuple[str, ...]: ...
    @property
    def losses_by_key(self) -> Mapping[str, float]: ...
    @property
    def capacity_factor(self) -> float: ...
    @property
    def bias_update(self) -> str | None: ...


def activated_conflicts(router: Router) -> Iterator[str]:
    """Yield what of ``[router]`` needs an activation that leaves experts out."""
    if router.activation == "relu_rmsnorm":
        return
    if router.routing == "relu":
        yield (
            f'routing = "relu" chooses the experts whose activation is not 0: set {_ACTIVATION}, '
            f'not "{router.activation}"'
        )
    if router.learned_scale:
        yield (
            f"learned_scale = true is the scale of {_ACTIVATION}, not of "
            f'"{router.activation}"; set that activation, or remove it; if it is inherited, set it '
            "to false"
        )


def chunk_conflicts(balance: Balance) -> Iterator[str]:
    """Yield why a chunk's length has no effect."""
    if balance.chunk != DEFAULT_CHUNK and "chunk_loss" not in balance.computed:
        yield (
            f"chunk = {balance.chunk} has no effect without chunk_loss. Set that, or remove it; if "
            f"it is inherited, set chunk = {DEFAULT_CHUNK}"
        )


def neighbour_conflicts(router: Router, balance: Balance) -> Iterator[str]:
    """Yield what of ``[balance]`` does not fit how ``[router]`` chooses."""
    by_key = balance.losses_by_key
    local = [key for key in by_key if key.endswith("locality_loss")]
    if local and router.activation != "relu_rmsnorm":
        yield (
            f"balance.{local[0]} compares which logits are above 0, and only router.{_ACTIVATION} "
            "chooses by that. Set it, or remove the loss; if it is inherited, set it to 0"
        )
    chunks = [key for key in by_key if key.endswith("chunk_loss")]
    if chunks and router.routing == "sinkhorn":
        yield (
            f'router.routing = "sinkhorn" excludes balance.{chunks[0]}: its plan spreads the '
            "tokens over all experts, whatever their neighbours choose. Remove the loss (set it to "
            '0 if it is inherited), or route with "topk" or "relu"'
        )
    if router.routing == "relu" and balance.capacity_factor:
        yield (
            f'router.routing = "relu" excludes balance.capacity_factor = '
            f"{balance.capacity_factor:g}: an expert's even share is one of a fixed number of "
            "choices, and tokens choose as many as they need. Remove it (set it to 0 if it is "
            'inherited), or route with "topk"'
        )
    if router.routing == "relu" and balance.bias_update not in (None, "none"):
        yield (
            f'router.routing = "relu" chooses without the selection bias: balance.bias_update = '
            f'"{balance.bias_update}" would move it further and further, unchecked. Remove it; if '
            'it is inherited, set it to "none"'
        )
