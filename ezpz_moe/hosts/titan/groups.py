"""Which tokens of a microbatch count, and what losses of routers are averaged over.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor


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
