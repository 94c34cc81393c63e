"""Sort a layer's tokens by expert, and add up what the experts return for each of them.

Legend of the suffixes: :mod:`.contract`.
"""

import torch
from torch import Tensor


def row_order(ids_TK: Tensor, num_rows: int) -> Tensor:
    """Return order_R, int64: row r carries choice ``order[r] % K`` of token ``order[r] // K``.

    The sort is stable, as the host's is: within an expert, rows are in the order of tokens.

    Args:
        ids_TK: every token's experts.
        num_rows: R. Choices beyond them, those with the highest ids, become no rows.
    """
    # A copy, because a view would keep the memory of what is left out as long as itself.
    return torch.argsort(ids_TK.flatten(), stable=True)[:num_rows].clone()


def sum_by_token(rows_RD: Tensor, token_R: Tensor, num_tokens: int) -> Tensor:
    """Return out_TD: the sum of every token's rows, zero for a token without rows.

    A gather, not a scatter: no atomics, so a rerun gives the same bits. Half dtypes are added up in
    float32 and rounded once.
    """
    # The rows of each token, one token after the other. Stable, so that their order is fixed.
    sorted_R, row_R = torch.sort(token_R, stable=True)
    starts_T = torch.searchsorted(sorted_R, torch.arange(num_tokens, device=token_R.device))
    return torch.embedding_bag(rows_RD, row_R, starts_T, mode=0)[0]  # 0: the sum
