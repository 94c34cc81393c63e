"""The truth that backends are measured against: a plain loop in float64, and the error bound.

Written for reading, not for speed: slices, ``@`` and autograd, sharing nothing with a backend.
Legend of the suffixes: :mod:`.contract`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCase(ABC):
    """What a backend is given: a layer's inputs, and the gradient that arrives at its output.

    Attributes:
        names: of the output, and of the gradients of ``inputs``.
        inputs: those that have gradients.
        grad_output: the gradient that arrives.
    """

    names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    @abstractmethod
    def grad_output(self) -> Tensor: ...

    @abstractmethod
    def apply(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Compute the layer's output from ``inputs``."""

    @property
    @abstractmethod
    def plains(self) -> tuple[Callable[..., Tensor], ...]:
        """The plain loops that compute this layer, in each order of operations that is allowed."""

    @abstractmethod
    def zeros(self) -> Iterator[tuple[str, Tensor, str]]:
        """Yield a tensor's name, the mask of what is exactly zero in it, and what to say if not."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Move the case to another device and floating dtype; integers stay integers."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return type(self)(**(vars(self) | moved))


def _zeros_of_idle_experts(counts_E: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    for name in ("grad_w1", "grad_w2", "grad_w3"):
        yield name, counts_E.cpu() == 0, "experts without tokens have a gradient"


@dataclass(frozen=True)
class Case(LayerCase):
    """An expert FFN."""

    names = ("y", "grad_w1", "grad_w2", "grad_w3", "grad_x")

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor
    x_RD: Tensor
    num_tokens_per_expert_E: Tensor
    grad_y_RD: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.w1_EFD, self.w2_EDF, self.w3_EFD, self.x_RD

    @property
    def grad_output(self) -> Tensor:
        return self.grad_y_RD

    def apply(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return compute(*inputs, self.num_tokens_per_expert_E)

    @property
    def plains(self) -> tuple[Callable[..., Tensor], ...]:
        return (plain_loop,)

    def zeros(self) -> Iterator[tuple[str, Tensor, str]]:
        tail_R = torch.arange(len(self.x_RD)) >= self.num_tokens_per_expert_E.cpu().sum()
        for name in ("y", "grad_x"):
            yield name, tail_R, "tail rows are not zero"
        yield from _zeros_of_idle_experts(self.num_tokens_per_expert_E)


@dataclass(frozen=True)
class RoutedCase(LayerCase):
    """A routed layer.

    Attributes:
        is_row_TK: whether a choice is a row of an expert: neither left out nor of no expert. bool,
            on the CPU.
    """

    names = ("out", "grad_w1", "grad_w2", "grad_w3", "grad_x", "grad_scores")

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor
    x_TD: Tensor
    scores_TK: Tensor
    ids_TK: Tensor
    num_tokens_per_expert_E: Tensor
    num_rows: int
    grad_out_TD: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.w1_EFD, self.w2_EDF, self.w3_EFD, self.x_TD, self.scores_TK

    @property
    def grad_output(self) -> Tensor:
        return self.grad_out_TD

    @property
    def is_row_TK(self) -> Tensor:
        return _are_rows(self.ids_TK, len(self.w1_EFD), self.num_rows)

    def apply(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        counts_E, rows = self.num_tokens_per_expert_E, self.num_rows
        return compute(*inputs, self.ids_TK, counts_E, num_rows=rows)

    @property
    def plains(self) -> tuple[Callable[..., Tensor], ...]:
        return (plain_routed, partial(plain_routed, scores_first=True))

    def zeros(self) -> Iterator[tuple[str, Tensor, str]]:
        for name in ("out", "grad_x"):
            yield name, ~self.is_row_TK.any(1), "tokens without experts are not zero"
        yield "grad_scores", ~self.is_row_TK, "choices without rows have a gradient"
        yield from _zeros_of_idle_experts(self.num_tokens_per_expert_E)


def random_case(
    counts: list[int],
    *,
    dim: int,
    hidden_dim: int,
    tail: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Make random inputs of an expert layer; the ``tail`` rows of x hold NaN.

    So do the weights of experts without tokens. Weights are scaled by the square root of their
    inner dimension: every product then keeps the scale of its input, whatever the sizes.
    """
    normal = _drawing(seed, device)
    R = sum(counts) + tail
    x_RD = normal(R, dim, dtype=dtype)
    # A kernel that reads tail rows, even to multiply them by zero, shows it.
    x_RD[sum(counts) :] = torch.nan
    counts_E = torch.tensor(counts, device=device, dtype=torch.int64)
    return Case(
        *_random_weights(normal, counts_E, dim, hidden_dim, dtype),
        x_RD=x_RD,
        num_tokens_per_expert_E=counts_E,
        grad_y_RD=normal(R, dim, dtype=dtype),
    )


def random_routed_case(
    ids: Sequence[Sequence[int]],
    *,
    num_experts: int,
    top_k: int,
    dim: int,
    hidden_dim: int,
    num_rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    scores_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> RoutedCase:
    """Make random inputs of a routed layer; ``top_k`` says what K is without tokens.

    A token none of whose choices becomes a row of an expert holds NaN, and so do the weights of
    experts without tokens.
    """
    normal = _drawing(seed, device)
    ids_TK = torch.tensor(ids, device=device, dtype=torch.int64).view(-1, top_k)
    rows = ids_TK.numel() if num_rows is None else num_rows
    routed_TK = _are_rows(ids_TK, num_experts, rows)
    x_TD = normal(len(ids_TK), dim, dtype=x_dtype or dtype)
    x_TD[~routed_TK.any(1)] = torch.nan
    counts_E = torch.bincount(ids_TK[routed_TK.to(device)], minlength=num_experts)
    return RoutedCase(
        *_random_weights(normal, counts_E, dim, hidden_dim, dtype),
        x_TD=x_TD,
        scores_TK=normal(*ids_TK.shape, dtype=scores_dtype or dtype),
        ids_TK=ids_TK,
        num_tokens_per_expert_E=counts_E,
        num_rows=rows,
        grad_out_TD=normal(*x_TD.shape, dtype=x_TD.dtype),
    )


def _are_rows(ids_TK: Tensor, num_experts: int, num_rows: int) -> Tensor:
    """Return whether a choice is a row of an expert: [T, K], on the CPU."""
    ids = ids_TK.flatten().tolist()
    kept = sorted(range(len(ids)), key=ids.__getitem__)[:num_rows]  # sorted() is stable
    is_row = torch.zeros(len(ids), dtype=torch.bool)
    is_row[[choice for choice in kept if ids[choice] < num_experts]] = True
    return is_row.view(ids_TK.shape)


def _drawing(seed: int, device: torch.device | str) -> Callable[..., Tensor]:
    # Draw on the CPU in float32 and convert: a seed then gives the same case on every device and,
    # but for rounding, in every dtype.
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)

    return normal


def _random_weights(
    normal: Callable[..., Tensor],
    counts_E: Tensor,
    dim: int,
    hidden_dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    E = len(counts_E)
    weights = (
        normal(E, hidden_dim, dim, dtype=dtype, scale=dim**-0.5),
        normal(E, dim, hidden_dim, dtype=dtype, scale=hidden_dim**-0.5),
        normal(E, hidden_dim, dim, dtype=dtype, scale=dim**-0.5),
    )
    # A kernel that multiplies padding of an expert that has nothing else shows it.
    for each_EXY in weights:
        each_EXY[counts_E == 0] = torch.nan
    return weights


def plain_loop(
    w1_EFD: Tensor, w2_EDF: Tensor, w3_EFD: Tensor, x_RD: Tensor, counts_E: Tensor
) -> Tensor:
    """Compute the expert FFN as one would write it on a blackboard; tail rows are zero."""
    counts = counts_E.tolist()
    # The tail is never multiplied, since it may hold NaN.
    *chunks_RD, tail_RD = x_RD.split([*counts, len(x_RD) - sum(counts)])
    outputs_RD = [
        (F.silu(x_nD @ w1_FD.T) * (x_nD @ w3_FD.T)) @ w2_DF.T
        for x_nD, w1_FD, w2_DF, w3_FD in zip(
            chunks_RD, w1_EFD.unbind(), w2_EDF.unbind(), w3_EFD.unbind(), strict=True
        )
    ]
    # Adds zero. Without experts, what remains is then still a function of every input.
    nothing = sum(each[:0].sum() for each in (w1_EFD, w2_EDF, w3_EFD, x_RD))
    return torch.cat([*outputs_RD, torch.zeros_like(tail_RD)]) + nothing


def plain_routed(
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    w3_EFD: Tensor,
    x_TD: Tensor,
    scores_TK: Tensor,
    ids_TK: Tensor,
    counts_E: Tensor,
    *,
    num_rows: int,
    scores_first: bool = False,
) -> Tensor:
    """Compute the routed layer as one would write it on a blackboard, expert by expert.

    Args:
        scores_first: apply the scores to the hidden rows, not to the outputs of the experts.
    """
    is_row_TK = _are_rows(ids_TK, len(w1_EFD), num_rows).to(ids_TK.device)
    # Adds zero: the result is a function of every input, whatever the routing.
    out_TD = torch.zeros_like(x_TD) + sum(each[:0].sum() for each in (w1_EFD, w2_EDF, w3_EFD))
    out_TD = out_TD + x_TD[:0].sum() + scores_TK[:0].sum()
    weights = zip(w1_EFD.unbind(), w2_EDF.unbind(), w3_EFD.unbind(), strict=True)
    for expert, (w1_FD, w2_DF, w3_FD) in enumerate(weights):
        token_n, choice_n = torch.where(is_row_TK & (ids_TK == expert))
        x_nD, score_n1 = x_TD[token_n].to(w1_FD.dtype), scores_TK[token_n, choice_n].unsqueeze(1)
        hidden_nF = F.silu(x_nD @ w1_FD.T) * (x_nD @ w3_FD.T)
        if scores_first:
            y_nD = (hidden_nF * score_n1).to(w2_DF.dtype) @ w2_DF.T
        else:
            y_nD = (hidden_nF @ w2_DF.T) * score_n1
        out_TD = out_TD.index_add(0, token_n, y_nD.to(out_TD.dtype))
    return out_TD


def run(compute: Callable[..., Tensor], case: LayerCase) -> dict[str, Tensor]:
    """Run ``ffn`` or ``routed``; return its output and the gradients, by ``case.names``."""
    inputs = [tensor.detach().requires_grad_() for tensor in case.inputs]
    output = case.apply(compute, *inputs)
    # allow_unused: a backend that loses a gradient returns None here, and the caller can say which.
    gradients = torch.autograd.grad(output, inputs, case.grad_output, allow_unused=True)
    return dict(zip(case.names, (output.detach(), *gradients), strict=True))


def truth(case: LayerCase) -> dict[str, Tensor]:
    """Compute the output and gradients in float64, on the CPU: some accelerators lack float64."""
    return run(case.plains[0], case.to("cpu", torch.float64))


def relative_error(value: Tensor, true: Tensor) -> float:
    """Return ``|value - true| / |true|`` in the Frobenius norm; just ``|value|`` if true is zero.

    ``value`` may be on any device; ``true`` is on the CPU in float64.
    """
    difference = torch.linalg.vector_norm(value.cpu().double() - true).item()
    scale = torch.linalg.vector_norm(true).item()
    return difference / scale if scale else difference


def error_bounds(case: LayerCase, true: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative errors allowed: twice the plain loop's in its dtype, + 1e-6.

    Of a routed layer, the loop with the larger error: scores may be applied on either side of the
    second product. Where positive and negative scores of a token nearly cancel, the two differ.
    """
    plains = [run(plain, case) for plain in case.plains]
    # Twice, because another order of summation gives an error of the same size but not the same
    # one. 1e-6 is for values where the plain loop happens to be exact, such as all zeros.
    return {
        name: 2 * max(relative_error(plain[name], true[name]) for plain in plains) + 1e-6
        for name in case.names
    }
