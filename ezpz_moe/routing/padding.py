"""Which tokens of a batch are padding.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from torch import Tensor

from ezpz_moe.config.routing_schema import Router


def tokens_that_count(tokens: Tensor, settings: Router, length: int) -> Tensor:
    """Return a bool mask like ``tokens``, False for padding by ``pad_token_id``.

    Args:
        tokens: ids, [B, L] or folded to [B * L].
        settings: a flavor's with a ``pad_token_id``; ``padding`` is ``"token"`` or ``"trailing"``.
        length: tokens of a sequence, L.
    """
    is_id = tokens == settings.pad_token_id
    if settings.padding == "token":
        return ~is_id
    return ~is_trailing(is_id.view(-1, length)).view_as(tokens)


def is_trailing(is_id_BL: Tensor) -> Tensor:
    """Return a bool mask_BL, True for the run of the id that ends a sequence, without its first.

    The first may be the end of a text: data that is padded with the end-of-text id shows it so.
    """
    # From the end, a product of ones and zeros is 1 until the first other token.
    run_BL = is_id_BL.int().flip(-1).cumprod(-1).flip(-1).bool()
    run_BL[..., 1:] &= run_BL[..., :-1].clone()
    run_BL[..., 0] = False
    return run_BL
