"""Hand the routers which labels count, for ``[router] padding = "labels"``.

Labels never reach the model. A data loader of ours adds a mask to the batch, which the host passes
on to the model like positions; a hook takes it off again before the model's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchtitan.config.override import derive

from ezpz_moe.hosts.titan.mixed import mixed

COUNTED = "ezpz_moe_counted"
"""The mask's key in a batch: bool, like the labels, False where a label is ignored."""


class _Labelled:
    """Mixin before a data loader of the host."""

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        # map and no generator: the loader's own iterator has to exist at once, as it is what a
        # checkpoint asks for its place.
        return map(_with_mask, super().__iter__())  # type: ignore[misc]


def _with_mask(batch: tuple[dict[str, Any], Tensor]) -> tuple[dict[str, Any], Tensor]:
    inputs, labels = batch
    return inputs | {COUNTED: labels != _ignore_index()}, labels


def _ignore_index() -> int:
    # Not at the top: everything that routes imports this module, and only this padding needs it.
    from torchtitan.components.loss import IGNORE_INDEX

    return IGNORE_INDEX


def labelled(dataloader: Any) -> Any:
    """Return the config of the same data loader of the host, whose batches say what counts.

    Raises:
        ImportError: the host has no index for labels to ignore.
    """
    _ignore_index()  # now, and not at the first batch
    return derive(dataloader, mixed(type(dataloader)._owner, _Labelled).Config)


def is_labelled(dataloader: Any) -> bool:
    """Return whether it is a config that :func:`labelled` has made."""
    return issubclass(type(dataloader)._owner, _Labelled)


def all_counted(dataloader: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return what such a loader adds to a batch whose labels all count; nothing for others."""
    return {COUNTED: torch.ones_like(tokens, dtype=torch.bool)} if is_labelled(dataloader) else {}
