"""Sort a layer's tokens by expert, and add up what the experts return for each of them.

Legend of the suffixes: :mod:`.contract`.
"""

import torch
from torch import Tensor

_COLUMNS = 128


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
    float32 and rounded once, halves to even.
    """
    # The rows of each token, one token after the other. Stable, so that their order is fixed.
    sorted_R, row_R = torch.sort(token_R, stable=True)
    starts_T = torch.searchsorted(sorted_R, torch.arange(num_tokens, device=token_R.device))
    if rows_RD.dtype != torch.bfloat16 or rows_RD.device.type != "cpu":
        return _sums(rows_RD, row_R, starts_T)
    # There torch rounds halves of bfloat16 away from zero, which makes every sum too large: by
    # 0.08 % for two rows of one sign. Some columns at a time, so that float32 rows stay in a cache.
    out_TD = rows_RD.new_empty(num_tokens, rows_RD.shape[1])
    for rows, out in zip(rows_RD.split(_COLUMNS, 1), out_TD.split(_COLUMNS, 1), strict=True):
        out.copy_(_sums(rows.float(), row_R, starts_T))
    return out_TD


def _sums(rows_RD: Tensor, row_R: Tensor, starts_T: Tensor) -> Tensor:
    return torch.embedding_bag(rows_RD, row_R, starts_T, mode=0)[0]  # 0: the sum
