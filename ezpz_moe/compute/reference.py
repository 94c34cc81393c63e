"""The truth that backends are measured against: a plain loop in float64, and the error bound.

:mod:`.plain` has the loops.
Legend of the suffixes: :mod:`.contract`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ezpz_moe.compute.arguments import Biases
from ezpz_moe.compute.plain import GATED, are_rows, plain_loop, plain_routed


@dataclass(frozen=True, kw_only=True)
class LayerCase(ABC):
    """What a backend is given: a layer's inputs, and the gradient that arrives at its output.

    ``w3`` is None if the activation has no gate; biases are None if there are none.
    """

    _output_name: ClassVar[str]

    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor | None
    b1_EF: Tensor | None = None
    b2_ED: Tensor | None = None
    b3_EF: Tensor | None = None
    num_tokens_per_expert_E: Tensor
    activation: str = "swiglu"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the output, and of the gradients of :attr:`inputs`."""
        gradients = (f"grad_{name}" for name, each in self._tensors.items() if each is not None)
        return self._output_name, *gradients

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs that have gradients."""
        return tuple(each for each in self._tensors.values() if each is not None)

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Weights and biases as kernels take them."""
        return self.w1_EFD, self.w2_EDF, self.w3_EFD, self.b1_EF, self.b2_ED, self.b3_EF

    @property
    @abstractmethod
    def grad_output(self) -> Tensor:
        """The gradient that arrives."""

    @property
    @abstractmethod
    def plains(self) -> tuple[Callable[..., Tensor], ...]:
        """The plain loops that compute this layer, in each order of operations that is allowed."""

    def zeros(self) -> Iterator[tuple[str, Tensor, str]]:
        """Yield a tensor's name, the mask of what is exactly zero in it, and what to say if not."""
        for name in self.names:
            if name.startswith(("grad_w", "grad_b")):
                idle_E = self.num_tokens_per_expert_E.cpu() == 0
                yield name, idle_E, "experts without tokens have a gradient"

    def apply(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Compute the layer's output from ``inputs``."""
        left = iter(inputs)
        given = [None if each is None else next(left) for each in self._tensors.values()]
        *others, b1_EF, b2_ED, b3_EF = given
        options: dict[str, Any] = {}
        # Nothing is said of what is plain, so that a function of tensors alone computes it too.
        if self.activation != "swiglu":
            options["activation"] = self.activation
        if b1_EF is not None and b2_ED is not None:
            options["biases"] = Biases(b1_EF, b2_ED, b3_EF)
        return self._apply(partial(compute, *others), options)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Move the case to another device and floating dtype; integers stay integers."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return type(self)(**(vars(self) | moved))

    @property
    def _tensors(self) -> dict[str, Tensor | None]:
        """All that may have gradients, by name."""
        weights = {"w1": self.w1_EFD, "w2": self.w2_EDF, "w3": self.w3_EFD}
        biases = {"b1": self.b1_EF, "b2": self.b2_ED, "b3": self.b3_EF}
        return weights | self._tokens | biases

    @property
    @abstractmethod
    def _tokens(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _apply(self, compute: Callable[..., Tensor], options: dict[str, Any]) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Case(LayerCase):
    """An expert FFN."""

    _output_name = "y"

    x_RD: Tensor
    grad_y_RD: Tensor

    @property
    def grad_output(self) -> Tensor:
        return self.grad_y_RD

    @property
    def plains(self) -> tuple[Callable[..., Tensor], ...]:
        return (plain_loop,)

    def zeros(self) -> Iterator[tuple[str, Tensor, str]]:
        tail_R = torch.arange(len(self.x_RD)) >= self.num_tokens_per_expert_E.cpu().sum()
        for name in ("y", "grad_x"):
            yield name, tail_R, "tail rows are not zero"
        yield from super().zeros()

    @property
    def _tokens(self) -> dict[str, Tensor]:
        return {"x": self.x_RD}

    def _apply(self, compute: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
        return compute(self.num_tokens_per_expert_E, **options)


@dataclass(frozen=True, kw_only=True)
class RoutedCase(LayerCase):
    """A routed layer.

    Attributes:
        is_row_TK: whether a choice is a row of an expert: neither left out nor of no expert. bool,
            on the CPU.
    """

    _output_name = "out"

    x_TD: Tensor
    scores_TK: Tensor
    ids_TK: Tensor
    num_rows: int
    grad_out_TD: Tensor

    @property
    def grad_output(self) -> Tensor:
        return self.grad_out_TD

    @property
    def is_row_TK(self) -> Tensor:
        return are_rows(self.ids_TK, len(self.w1_EFD), self.num_rows)

    @property
    def plains(self) -> tuple[Callable[..., Tensor], ...]:
        return (plain_routed, partial(plain_routed, scores_first=True))

    def zeros(self) -> Iterator[tuple[str, Tensor, str]]:
        for name in ("out", "grad_x"):
            yield name, ~self.is_row_TK.any(1), "tokens without experts are not zero"
        yield "grad_scores", ~self.is_row_TK, "choices without rows have a gradient"
        yield from super().zeros()

    @property
    def _tokens(self) -> dict[str, Tensor]:
        return {"x": self.x_TD, "scores": self.scores_TK}

    def _apply(self, compute: Callable[..., Tensor], options: dict[str, Any]) -> Tensor:
        counts_E, rows = self.num_tokens_per_expert_E, self.num_rows
        return compute(self.ids_TK, counts_E, num_rows=rows, **options)


def random_case(
    counts: list[int],
    *,
    dim: int,
    hidden_dim: int,
    tail: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    activation: str = "swiglu",
    biased: bool = False,
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
    weights = _random_weights(normal, counts_E, dim, hidden_dim, dtype)
    grad_y_RD = normal(R, dim, dtype=dtype)
    sizes = (dim, hidden_dim) if biased else None
    return Case(
        **_parameters(normal, counts_E, weights, activation, sizes),
        x_RD=x_RD,
        num_tokens_per_expert_E=counts_E,
        grad_y_RD=grad_y_RD,
        activation=activation,
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
    activation: str = "swiglu",
    biased: bool = False,
) -> RoutedCase:
    """Make random inputs of a routed layer; ``top_k`` says what K is without tokens.

    A token none of whose choices becomes a row of an expert holds NaN, and so do the weights of
    experts without tokens.
    """
    normal = _drawing(seed, device)
    ids_TK = torch.tensor(ids, device=device, dtype=torch.int64).view(-1, top_k)
    rows = ids_TK.numel() if num_rows is None else num_rows
    routed_TK = are_rows(ids_TK, num_experts, rows)
    x_TD = normal(len(ids_TK), dim, dtype=x_dtype or dtype)
    x_TD[~routed_TK.any(1)] = torch.nan
    counts_E = torch.bincount(ids_TK[routed_TK.to(device)], minlength=num_experts)
    weights = _random_weights(normal, counts_E, dim, hidden_dim, dtype)
    scores_TK = normal(*ids_TK.shape, dtype=scores_dtype or dtype)
    grad_out_TD = normal(*x_TD.shape, dtype=x_TD.dtype)
    sizes = (dim, hidden_dim) if biased else None
    return RoutedCase(
        **_parameters(normal, counts_E, weights, activation, sizes),
        x_TD=x_TD,
        scores_TK=scores_TK,
        ids_TK=ids_TK,
        num_tokens_per_expert_E=counts_E,
        num_rows=rows,
        grad_out_TD=grad_out_TD,
        activation=activation,
    )


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


def _parameters(
    normal: Callable[..., Tensor],
    counts_E: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    activation: str,
    sizes: tuple[int, int] | None,
) -> dict[str, Tensor | None]:
    """Return the weights that an activation has, and random biases if D and F are given."""
    w1_EFD, w2_EDF, w3_EFD = weights
    if activation == "clamped_swiglu":  # some rows have to reach its limit
        w1_EFD, w3_EFD = w1_EFD * 4, w3_EFD * 4
    is_gated = activation in GATED
    found = {"w1_EFD": w1_EFD, "w2_EDF": w2_EDF, "w3_EFD": w3_EFD if is_gated else None}
    if sizes is None:
        return found
    dim, hidden_dim = sizes
    columns = {"b1_EF": hidden_dim, "b2_ED": dim} | ({"b3_EF": hidden_dim} if is_gated else {})
    for name, size in columns.items():
        bias_EX = normal(len(counts_E), size, dtype=w1_EFD.dtype)
        bias_EX[counts_E == 0] = torch.nan
        found[name] = bias_EX
    return found


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
