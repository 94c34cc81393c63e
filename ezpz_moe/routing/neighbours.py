"""Losses that make neighbouring tokens use the same, few experts.

Both are those of BlockFFN, arXiv 2507.08771, section 3.2, as its authors compute them in
https://github.com/thunlp/BlockFFN (``pretrain/cpm/dragonfly/activation_context.py``). Neighbours
are tokens of one sequence; where documents are packed into it, also those of two documents.

Legend of the suffixes: :mod:`ezpz_moe.routing`; S = sequences of a group, L = their length,
C = chunks of a sequence, c = tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEEPNESS = 100.0
"""What logits are multiplied by before the sigmoid that stands for "above 0"."""


class Neighbours(NamedTuple):
    """Which tokens of a group are neighbours.

    Attributes:
        raw_GNE: the gate's logits, before ReLU.
        length: tokens of a sequence, L; a group's sequences follow each other.
        chunk: tokens of a chunk, c.
    """

    raw_GNE: Tensor
    length: int
    chunk: int

    def in_sequences(self, values_GNX: Tensor) -> Tensor:
        """Return [G, N, ...] as [G, S, L, ...]."""
        return values_GNX.unflatten(1, (-1, self.length))


def locality_loss(of: Neighbours, mask_GN: Tensor, share: Callable[[Tensor], Tensor]) -> Tensor:
    """Return loss_G: the binary cross-entropy of one token's active experts from the one before.

    With ``a = sigmoid(100 logit)``, close to 1 for an active expert and to 0 for another, it is the
    mean over pairs of neighbours and over experts of ``-a' ln a - (1 - a') ln(1 - a)``, where a' is
    the later token's. It has a gradient in both.

    Args:
        of: the tokens' logits, and their sequences.
        mask_GN: bool, False for padding. A pair with padding does not count.
        share: sums over the ranks of a group.
    """
    # Mask first: for a padding token with NaN, the gradient would otherwise be NaN * 0.
    raw_GNE = torch.where(mask_GN.unsqueeze(-1), of.raw_GNE, 0)
    steep_GSLE = STEEPNESS * of.in_sequences(raw_GNE)
    mask_GSL = of.in_sequences(mask_GN)
    both_GSL = mask_GSL[..., :-1] & mask_GSL[..., 1:]
    each_GSL = F.binary_cross_entropy_with_logits(
        steep_GSLE[..., :-1, :], steep_GSLE[..., 1:, :].sigmoid(), reduction="none"
    ).mean(-1)
    sums_G = torch.where(both_GSL, each_GSL, 0).sum((1, 2))
    return share(sums_G) / share(both_GSL.sum((1, 2)).float()).clamp(min=1)


def chunk_loss(
    of: Neighbours, p_GNE: Tensor, mask_GN: Tensor, share: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return loss_G: the mean over chunks and experts of the probability that a chunk uses one.

    That is 1 less the product over the chunk's tokens of 1 - p. Chunks follow each other in a
    sequence; the last one may be shorter. One of padding alone does not count.

    Args:
        of: the tokens' sequences, and the length of a chunk.
        p_GNE: probabilities of the experts that compute; zeros for padding.
        mask_GN: bool, False for padding.
        share: sums over the ranks of a group.
    """
    beyond = -of.length % of.chunk
    p_GSLE = F.pad(of.in_sequences(p_GNE), (0, 0, 0, beyond))
    mask_GSL = F.pad(of.in_sequences(mask_GN), (0, beyond))
    unused_GSCE = (1 - p_GSLE.unflatten(2, (-1, of.chunk))).prod(3)
    counts_GSC = mask_GSL.unflatten(2, (-1, of.chunk)).any(-1)
    # A chunk of padding alone has unused = 1, and adds nothing.
    used_GSC = 1 - unused_GSCE.mean(-1)
    return share(used_GSC.sum((1, 2))) / share(counts_GSC.sum((1, 2)).float()).clamp(min=1)
