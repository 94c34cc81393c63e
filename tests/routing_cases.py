"""Groups of tokens with scores, logits, choices and padding, and the losses written out for them.

The reference is plain Python in float64: loops over tokens and experts that share nothing with
the package. Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ezpz_moe.routing import losses

U = 2.0**-24
"""Unit roundoff of float32: each operation is off by this factor at most."""

LOSSES = ("switch", "mse", "z")


@dataclass(frozen=True)
class Case:
    """A microbatch. Padding has NaN as scores and logits."""

    scores_BLE: Tensor
    logits_BLE: Tensor
    ids_BLK: Tensor
    mask_BL: Tensor

    @property
    def K(self) -> int:
        return self.ids_BLK.shape[-1]

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Scores and logits to differentiate in."""
        pair = (self.scores_BLE, self.logits_BLE)
        return tuple(each.detach().to(dtype, copy=True).requires_grad_() for each in pair)

    def rows(self, rows: slice) -> Case:
        """Some of the sequences."""
        return Case(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


MASKS = ("none_padded", "some_padded", "a_sequence_padded", "all_padded")


def make_case(
    B: int, L: int, E: int, K: int, *, mask: str = "some_padded", sigmoid: bool = False
) -> Case:
    """Random logits, their scores and the top-k of these."""
    generator = torch.Generator().manual_seed(B + 10 * L + 100 * E + 1000 * K)
    logits_BLE = 2 * torch.randn(B, L, E, generator=generator)
    scores_BLE = logits_BLE.sigmoid() if sigmoid else logits_BLE.softmax(-1)
    ids_BLK = scores_BLE.topk(K, dim=-1).indices
    mask_BL = torch.ones(B, L, dtype=torch.bool)
    if mask == "some_padded":
        mask_BL = torch.rand(B, L, generator=generator) < 0.6
        mask_BL[:, 0] = True
    if mask == "a_sequence_padded":
        mask_BL[-1] = False
    if mask == "all_padded":
        mask_BL[:] = False
    padding_BL1 = ~mask_BL.unsqueeze(-1)
    logits_BLE, scores_BLE = (
        each.masked_fill(padding_BL1, torch.nan) for each in (logits_BLE, scores_BLE)
    )
    return Case(scores_BLE, logits_BLE, ids_BLK, mask_BL)


def of_groups(
    leaves: tuple[Tensor, Tensor],
    case: Case,
    *,
    by_sequence: bool,
    share: losses.Share = losses.alone,
) -> dict[str, Tensor]:
    """Each loss_G by the package's functions, put together as a router does."""
    scores_GNE, logits_GNE, ids_GNK, mask_GN = (
        losses.in_groups(each, by_sequence=by_sequence)
        for each in (*leaves, case.ids_BLK, case.mask_BL)
    )
    n_G = losses.tokens_in_group(mask_GN, share)
    counts_GE = share(losses.assignments(ids_GNK, mask_GN, scores_GNE.shape[-1]))
    p_GNE = losses.probabilities(scores_GNE, mask_GN)
    P_GE = losses.mean_probability(p_GNE, mask_GN, n_G, share)
    return {
        "switch": losses.switch_loss(counts_GE / (n_G * case.K).unsqueeze(-1), P_GE),
        "mse": losses.mse_loss(P_GE),
        "z": losses.z_loss(logits_GNE, mask_GN, n_G, share),
    }


@dataclass
class Written:
    """A group's loss and its gradient, token by token, with a bound on float32's error of each."""

    loss: float
    loss_bound: float
    gradient: list[list[float]]
    gradient_bound: list[list[float]]


def written_groups(case: Case, *, by_sequence: bool) -> Iterator[dict[str, Written]]:
    """Every loss of every group, in the groups' order."""
    B, L = case.mask_BL.shape
    groups = [[(b, t) for t in range(L)] for b in range(B)]
    for tokens in groups if by_sequence else [list(itertools.chain(*groups))]:
        yield {
            "switch": _written_balance(case, tokens, "switch"),
            "mse": _written_balance(case, tokens, "mse"),
            "z": _written_z(case, tokens),
        }


def _written_balance(case: Case, tokens: list[tuple[int, int]], name: str) -> Written:
    """The two losses of the mean probabilities P.

    Bound: p = s / sum of E positive scores is off by (E + 1) u of itself, P as the mean of N such
    by (E + N + 2) u, f by 2 u, and what is made of them by less than (E + 6) u more; a difference
    by that share of the sum of its terms' sizes. In all below r = (2E + N + 10) u.
    """
    E = case.scores_BLE.shape[-1]
    r = (2 * E + len(tokens) + 10) * U
    scores = {at: case.scores_BLE[at].tolist() for at in tokens if case.mask_BL[at]}
    n = max(1, len(scores))
    f, P = [0.0] * E, [0.0] * E
    for at, s in scores.items():
        for e in case.ids_BLK[at].tolist():
            f[e] += 1 / (n * case.K)
        for e in range(E):
            P[e] += s[e] / sum(s) / n
    if name == "switch":
        loss = E * sum(f[e] * P[e] for e in range(E))
        loss_bound = r * loss
        by_P = by_P_size = [E * f[e] for e in range(E)]
    else:
        even = 1 / E if scores else 0.0
        loss = sum((P[e] - even) ** 2 for e in range(E)) / E
        off = [r * (P[e] + even) for e in range(E)]  # of the difference, whose square is off by
        off_squares = [2 * abs(P[e] - even) * off[e] + off[e] ** 2 for e in range(E)]
        loss_bound = r * loss + sum(off_squares) / E
        by_P = [2 * (P[e] - even) / E for e in range(E)]
        by_P_size = [2 * (P[e] + even) / E for e in range(E)]
    written = Written(loss, loss_bound, [], [])
    for at in tokens:
        s = scores.get(at, [1.0])
        pull, pull_size = (
            sum(each[e] * s[e] / sum(s) for e in range(E)) if at in scores else 0.0
            for each in (by_P, by_P_size)
        )
        scale = 1 / (n * sum(s)) if at in scores else 0.0
        written.gradient.append([scale * (by_P[e] - pull) for e in range(E)])
        written.gradient_bound.append([r * scale * (by_P_size[e] + pull_size) for e in range(E)])
    return written


def _written_z(case: Case, tokens: list[tuple[int, int]]) -> Written:
    """The mean of logsumexp squared.

    Bound: exponentials of differences that are off by u |x - max| each, E of them added up, then a
    logarithm: absolutely (range + E + 4) u. The gradient has the softmax of the same differences.
    """
    E = case.logits_BLE.shape[-1]
    logits = {at: case.logits_BLE[at].tolist() for at in tokens if case.mask_BL[at]}
    n = max(1, len(logits))
    written = Written(0.0, 0.0, [], [])
    for at in tokens:
        x = logits.get(at)
        written.gradient.append([0.0] * E)
        written.gradient_bound.append([0.0] * E)
        if x is None:
            continue
        total = sum(math.exp(x[e]) for e in range(E))
        lse = math.log(total)
        off = (max(x) - min(x) + E + 4) * U + 2 * U * (abs(lse) + abs(max(x)))
        written.loss += lse**2 / n
        written.loss_bound += (2 * abs(lse) * off + (len(tokens) + 3) * U * lse**2) / n
        for e in range(E):
            written.gradient[-1][e] = 2 * lse * math.exp(x[e]) / total / n
            softmax_off = off + (E + 4) * U
            written.gradient_bound[-1][e] = (
                2 * (off + abs(lse) * softmax_off) * math.exp(x[e]) / total / n
            )
    return written


def compiled(function: Callable) -> Callable:
    """Traced as a whole, forward and backward, and run as traced."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


RUNS = {
    "eager": lambda function: function,
    "reentrant": lambda function: partial(checkpoint, function, use_reentrant=True),
    "not_reentrant": lambda function: partial(checkpoint, function, use_reentrant=False),
    "compiled": compiled,
    "checkpoint_in_compiled": lambda f: compiled(partial(checkpoint, f, use_reentrant=False)),
    "compiled_in_checkpoint": lambda f: partial(checkpoint, compiled(f), use_reentrant=False),
}
over_runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())
