"""Keep tokens with some experts while these learn: the anchor loss of SEUF, arXiv 2411.18797.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.routing.losses import Share, alone, tokens_in_group


class Anchor(NamedTuple):
    """The experts that are to be chosen, bool, and the coefficient of the loss."""

    trained_E: Tensor
    coefficient: float


def anchor_loss(p_GNE: Tensor, mask_GN: Tensor, trained_E: Tensor, share: Share = alone) -> Tensor:
    """Return the squared distance of a token's probabilities from those that it is to have.

    That is 1 for one expert that learns, and 1 / n for each of n. The mean over the tokens of a
    group, summed over groups; a scalar, differentiable in the probabilities.

    Args:
        p_GNE: :func:`.losses.probabilities` of all experts.
        mask_GN: bool, False for padding.
        trained_E: bool, on any device: the experts that learn; those after them do not.
        share: sums over the ranks of a group.
    """
    # Zero-computation experts come last.
    wanted_E = F.pad(trained_E, (0, p_GNE.shape[-1] - len(trained_E)))
    wanted_E = wanted_E.to(p_GNE.device).to(p_GNE.dtype)
    wanted_E = wanted_E / wanted_E.sum().clamp(min=1)
    distance_GN = torch.where(mask_GN, (p_GNE - wanted_E).square().sum(-1), 0)
    return (distance_GN.sum(-1) / tokens_in_group(mask_GN, share)).sum()
