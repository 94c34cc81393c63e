"""Average a router's scores over similar earlier tokens of the same document.

A token's scores become

    (1 - s) scores_i + s sum_j a_ij scores_j,    a_i = softmax over j of cos(x_i, x_j) / temperature

where x is the router's input and j are the last ``window`` tokens of i's document, i included.

Source: the Similarity-Aware MoE of Graph of Tokens, arXiv 2505.00792. Not from there: the
window, which makes the cost linear in L; only earlier tokens, without which a token's experts would
show what follows it; the cosine; and the strength s.

Legend of the suffixes: :mod:`ezpz_moe.routing`; N = blocks of a sequence, w = tokens of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.config.similarity_schema import Similarity


def averaged(
    scores_BLE: Tensor, x_BLD: Tensor, documents_BL: Tensor, settings: Similarity
) -> Tensor:
    """Return the scores averaged over similar earlier tokens, in their dtype.

    A sequence is cut into blocks as long as the window: a token's window is then in its own block
    and the one before, and memory is O(L window) instead of O(L L).

    Args:
        scores_BLE: at least float32.
        x_BLD: the router's input, any floating dtype; cosines are computed in at least float32.
        documents_BL: from :func:`documents_of`.
        settings: the flavor's, with a strength above 0.
    """
    length = scores_BLE.shape[1]
    w = min(settings.window, length)
    dtype = torch.promote_types(scores_BLE.dtype, x_BLD.dtype)
    # autocast would turn cosines and scores back into bfloat16.
    with torch.autocast(x_BLD.device.type, enabled=False):
        unit_BNwD = in_blocks(F.normalize(x_BLD.to(dtype), dim=-1), w)
        cosines_BNwW = _with_keys_before(unit_BNwD, unit_BNwD)
        seen_BNwW = _seen(in_blocks(documents_BL.unsqueeze(-1), w).squeeze(-1))
        logits_BNwW = cosines_BNwW / settings.temperature
        shares_BNwW = logits_BNwW.masked_fill(~seen_BNwW, -torch.inf).softmax(-1)
        means_BNwE = _mixed(shares_BNwW, in_blocks(scores_BLE.to(dtype), w))
    means_BLE = means_BNwE.flatten(1, 2)[:, :length].to(scores_BLE.dtype)
    return (1 - settings.strength) * scores_BLE + settings.strength * means_BLE


def documents_of(positions_BL: Tensor) -> Tensor:
    """Return the number of each token's document, from 0 in each sequence.

    A document begins where positions do, at 0: the host's convention, by which its attention masks
    are made.
    """
    return (positions_BL == 0).cumsum(-1)


def in_blocks(values_BLX: Tensor, w: int) -> Tensor:
    """Return values_BNwX, with zeros behind the last token where L is no multiple of w."""
    behind = -values_BLX.shape[1] % w
    return F.pad(values_BLX, (0, 0, 0, behind)).unflatten(1, (-1, w))


def _with_keys_before(queries_BNwD: Tensor, keys_BNwD: Tensor) -> Tensor:
    """Return the products of a block's tokens with the block before and with their own: BNw(2w)."""
    own_BNww = queries_BNwD @ keys_BNwD.mT
    before_BMww = queries_BNwD[:, 1:] @ keys_BNwD[:, :-1].mT  # M = N - 1: the first has none
    return torch.cat([F.pad(before_BMww, (0, 0, 0, 0, 1, 0)), own_BNww], -1)


def _seen(documents_BNw: Tensor) -> Tensor:
    """Return which of these 2w tokens a token looks at: bool."""
    w = documents_BNw.shape[-1]
    # Documents are counted from 0, so that nothing before the first block is of one.
    before_BNw = F.pad(documents_BNw[:, :-1], (0, 0, 1, 0), value=-1)
    of_keys_BNW = torch.cat([before_BNw, documents_BNw], -1)
    place_W = torch.arange(2 * w, device=documents_BNw.device)
    back_wW = place_W[w:].unsqueeze(-1) - place_W
    is_near_wW = (back_wW >= 0) & (back_wW < w)
    return is_near_wW & (documents_BNw.unsqueeze(-1) == of_keys_BNW.unsqueeze(-2))


def _mixed(shares_BNwW: Tensor, scores_BNwE: Tensor) -> Tensor:
    """Return the sum of the scores of both blocks, each times its share."""
    w = scores_BNwE.shape[2]
    of_own_BNwE = shares_BNwW[..., w:] @ scores_BNwE
    of_before_BMwE = shares_BNwW[:, 1:, :, :w] @ scores_BNwE[:, :-1]
    return of_own_BNwE + F.pad(of_before_BMwE, (0, 0, 0, 0, 1, 0))


def multiplied(length: int, window: int, width: int) -> int:
    """Return the multiply-adds of one product of :func:`averaged` over a sequence, forward.

    Args:
        length: tokens of a sequence, L.
        window: the flavor's.
        width: D for the cosines, E for the mean.
    """
    w = min(window, length)
    blocks = -(-length // w)
    # Every block with itself, and every one but the first with the one before.
    return (2 * blocks - 1) * w * w * width
