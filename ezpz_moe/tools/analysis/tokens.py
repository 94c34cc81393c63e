"""Token-ID specialization: OpenMoE, arXiv 2402.01739, section 4, measured in two ways.

Legend of the suffixes: T = tokens of the text, K = experts of a token, E = experts, V = token IDs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Explained:
    """How well a token's experts can be predicted.

    Attributes:
        by_token: share of a token's experts that are among the k most frequent experts of the
            *other* occurrences of its ID.
        by_frequency: the same with the k most frequent experts of all other tokens.
        share: what knowing the ID adds, as a share of what was missing: 0 nothing, 1 everything;
            below 0 where rare IDs mislead. None if by_frequency is 1.
        tokens: the number of tokens measured: those whose ID occurs at least twice.
    """

    by_token: float
    by_frequency: float
    share: float | None
    tokens: int


def explained_by_token(ids_TK: torch.Tensor, tokens_T: torch.Tensor, num_experts: int) -> Explained:
    """Return how much of the routing the token ID alone explains.

    Each token is left out of its own prediction. A token that occurs once therefore explains
    nothing, while mutual information, counted on the same text, would let it explain everything.

    Args:
        ids_TK: the chosen experts, integers, none twice for a token; E is none of them.
        tokens_T: token IDs, integers.
        num_experts: E.

    Raises:
        ValueError: no ID occurs twice.
    """
    chosen_TE = multi_hot(ids_TK, num_experts)
    # Number the IDs that occur: a table over the whole vocabulary would be mostly zeros.
    _, index_T = torch.unique(tokens_T, return_inverse=True)
    counts_VE = torch.zeros(int(index_T.max()) + 1, num_experts, dtype=torch.float64)
    counts_VE.index_add_(0, index_T, chosen_TE)
    is_repeated_T = torch.bincount(index_T)[index_T] > 1
    if not is_repeated_T.any():
        raise ValueError("no token ID occurs twice")
    chosen_TE, index_T = chosen_TE[is_repeated_T], index_T[is_repeated_T]
    # Subtracting chosen_TE leaves each token out of its own prediction.
    by_token = _overlap(counts_VE[index_T] - chosen_TE, chosen_TE)
    by_frequency = _overlap(counts_VE.sum(0) - chosen_TE, chosen_TE)
    missing = 1 - by_frequency
    share = (by_token - by_frequency) / missing if missing > 0 else None
    return Explained(by_token, by_frequency, share, len(index_T))


def _overlap(counts_TE: torch.Tensor, chosen_TE: torch.Tensor) -> float:
    """Return the mean share of a token's k chosen experts that are among the k largest counts.

    A token without experts has no share.

    Experts with equal counts that compete for the last places share these equally, which is the
    mean over all ways to choose among them.
    """
    is_used_T = chosen_TE.any(1)
    counts_TE, chosen_TE = counts_TE[is_used_T], chosen_TE[is_used_T]
    k_T1 = chosen_TE.sum(1, keepdim=True).long()
    last_T1 = counts_TE.sort(dim=1, descending=True).values.gather(1, k_T1 - 1)
    above_TE, tied_TE = counts_TE > last_T1, counts_TE == last_T1
    places_T1 = (k_T1 - above_TE.sum(1, keepdim=True)).double()
    predicted_TE = above_TE + tied_TE * places_T1 / tied_TE.sum(1, keepdim=True)
    return ((predicted_TE * chosen_TE).sum(1, keepdim=True) / k_T1).mean().item()


def concentration(ids_TK: torch.Tensor, tokens_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return how narrow each expert's tokens are: 1 - H(token | expert) / H(token).

    H is the entropy of the token IDs among the expert's tokens, and in the whole text. 0: the
    expert sees the text as it is; 1: it sees a single ID. An expert with few tokens is narrow
    merely because they are few.

    Returns:
        [E] in float64; NaN for an expert without tokens, and where the text has a single ID.
    """
    _, index_T = torch.unique(tokens_T, return_inverse=True)
    # One row more, for choices of no expert.
    counts_EV = torch.zeros(num_experts + 1, int(index_T.max()) + 1, dtype=torch.float64)
    pairs = index_T.unsqueeze(1).expand_as(ids_TK)
    ones = torch.ones(ids_TK.numel(), dtype=torch.float64)
    # accumulate: a pair occurs many times, and without it only one of them would count.
    counts_EV.index_put_((ids_TK.flatten().long(), pairs.flatten()), ones, accumulate=True)
    counts_EV = counts_EV[:num_experts]
    of_text = entropy(torch.bincount(index_T).double().unsqueeze(0))
    is_used_E = counts_EV.sum(1) > 0
    narrow_E = 1 - entropy(counts_EV) / of_text
    return torch.where(is_used_E & (of_text > 0), narrow_E, torch.nan)


def top_tokens(
    ids_TK: torch.Tensor, tokens_T: torch.Tensor, num_experts: int, *, count: int
) -> list[list[tuple[int, float]]]:
    """Return the most frequent token IDs of each expert, with their shares of its tokens."""
    found = []
    for e in range(num_experts):
        of_expert = tokens_T[(ids_TK == e).any(1)]
        values, counts = torch.unique(of_expert, return_counts=True)
        # stable: IDs that are equally frequent come in order, the same on every machine.
        order = counts.argsort(descending=True, stable=True)[:count]
        shares = counts[order] / max(1, len(of_expert))
        found.append(list(zip(values[order].tolist(), shares.tolist(), strict=True)))
    return found


def multi_hot(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Set 1 for each chosen expert: [T, E] in float64. The id E is that of no expert."""
    # float64, in which sums and differences of counts are exact.
    zeros_TF = torch.zeros(ids_TK.shape[0], num_experts + 1, dtype=torch.float64)
    return zeros_TF.scatter_(1, ids_TK.long(), 1.0)[:, :num_experts]


def entropy(counts_NV: torch.Tensor) -> torch.Tensor:
    """Return the entropy [N] in nats of each row's frequencies; 0 for a row of zeros."""
    # clamp: a row of zeros stays zero instead of becoming 0 / 0.
    shares_NV = counts_NV / counts_NV.sum(1, keepdim=True).clamp_min(1)
    return torch.special.entr(shares_NV).sum(1)
