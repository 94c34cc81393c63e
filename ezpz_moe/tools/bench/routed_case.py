"""The inputs of a routed layer: tokens, their experts and scores.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ezpz_moe.compute.arguments import Biases
from ezpz_moe.compute.reference import Case, random_case
from ezpz_moe.tools.bench.shapes import Shape


@dataclass(frozen=True)
class RoutedCase:
    """One routed layer's inputs, and the gradient that arrives at its output.

    Scores are in float32 beside half-precision weights, as a router gives them. ``w3`` is None if
    the activation has no gate.
    """

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor | None
    x_TD: Tensor
    scores_TK: Tensor
    ids_TK: Tensor
    num_tokens_per_expert_E: Tensor
    grad_out_TD: Tensor
    activation: str = "swiglu"
    biases: Biases | None = None

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.w1_EFD, self.w2_EDF, self.w3_EFD

    @property
    def options(self) -> dict[str, Any]:
        """What a backend is told besides tensors."""
        return {"activation": self.activation, "biases": self.biases}

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The weights and biases that there are."""
        return tuple(each for each in (*self.weights, *(self.biases or ())) if each is not None)

    def as_leaves(self) -> RoutedCase:
        """Return the same with parameters, tokens and scores that require a gradient."""
        return self._of(lambda each: each.detach().requires_grad_())

    def to(self, dtype: torch.dtype) -> RoutedCase:
        """Return the case in another dtype: scores at least in float32, integers as they are."""
        case = self._of(lambda each: each.to(dtype))
        return replace(case, scores_TK=self.scores_TK.to(_scores_dtype(dtype)))

    def _of(self, change: Callable[[Tensor], Tensor]) -> RoutedCase:
        """Return the case with other tensors, integers as they are."""
        changed: dict[str, Any] = {
            name: change(each)
            for name, each in vars(self).items()
            if isinstance(each, Tensor) and each.is_floating_point()
        }
        if self.biases is not None:
            of_each = (each if each is None else change(each) for each in self.biases)
            changed["biases"] = Biases(*of_each)
        return replace(self, **changed)


def random_routed_case(
    counts: Sequence[int],
    *,
    top_k: int,
    dim: int,
    hidden_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    activation: str = "swiglu",
    biased: bool = False,
) -> RoutedCase:
    """Make random inputs in which expert e has ``counts[e]`` rows; a token's experts differ.

    Weights are those of :func:`.random_case`, NaN for experts without tokens. Each token's scores
    are positive and sum to 1.

    Args:
        counts: their sum is T * ``top_k``; none is above T.
    """
    flat = random_case(
        list(counts),
        dim=dim,
        hidden_dim=hidden_dim,
        dtype=dtype,
        device=device,
        activation=activation,
        biased=biased,
    )
    T = sum(counts) // top_k
    generator = torch.Generator().manual_seed(0)
    logits_TK = torch.randn(T, top_k, generator=generator)
    experts_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    # An expert's rows fall on neighbouring columns of this, which are different tokens.
    ids_KT = experts_R.view(top_k, T)[:, torch.randperm(T, generator=generator)]
    return RoutedCase(
        w1_EFD=flat.w1_EFD,
        w2_EDF=flat.w2_EDF,
        w3_EFD=flat.w3_EFD,
        # Copied, because a view would keep all R rows in memory.
        x_TD=flat.x_RD[:T].clone(),
        scores_TK=logits_TK.softmax(dim=1).to(device, _scores_dtype(dtype)),
        ids_TK=ids_KT.T.contiguous().to(device),
        num_tokens_per_expert_E=flat.num_tokens_per_expert_E,
        grad_out_TD=flat.grad_y_RD[:T].clone(),
        activation=activation,
        biases=_biases(flat),
    )


def _biases(case: Case) -> Biases | None:
    if case.b1_EF is None or case.b2_ED is None:
        return None
    return Biases(case.b1_EF, case.b2_ED, case.b3_EF)


def empty_routed_case(shape: Shape, dtype: torch.dtype) -> RoutedCase:
    """Make inputs without memory, on the meta device, where every operator knows shapes alone."""
    E, D, F, _ = shape.sizes
    empty = partial(torch.empty, device="meta")
    return RoutedCase(
        w1_EFD=empty(E, F, D, dtype=dtype),
        w2_EDF=empty(E, D, F, dtype=dtype),
        w3_EFD=empty(E, F, D, dtype=dtype),
        x_TD=empty(shape.T, D, dtype=dtype),
        scores_TK=empty(shape.T, shape.K, dtype=_scores_dtype(dtype)),
        ids_TK=empty(shape.T, shape.K, dtype=torch.int64),
        num_tokens_per_expert_E=empty(E, dtype=torch.int64),
        grad_out_TD=empty(shape.T, D, dtype=dtype),
    )


def _scores_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
