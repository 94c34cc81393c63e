"""Count what a model costs: parameters and FLOPs per token, by component. Numbers only, no torch.

FLOPs are those of matrix products: 2 per multiply-add. The backward pass costs twice the forward
pass, because each product has two gradients. docs/guides/describe.md has the definitions.

Legend: E = experts, k = experts per token, Z = zero-computation experts, D = model dimension,
F = hidden size of an FFN, L = tokens in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from statistics import fmean
from typing import Literal

from ezpz_moe.config.layer_sizes import sizes_of
from ezpz_moe.errors import EzpzError

BACKWARD = 2
"""Backward FLOPs per forward FLOP: the gradient of a product's weight, and that of its input."""

_WITHOUT_GATE = ("gelu", "relu2")

COMPONENTS = (
    "embeddings",
    "attention projections",
    "attention scores",
    "router",
    "latent projections",
    "routed experts",
    "zero-computation experts",
    "shared experts",
    "dense FFN",
    "norms",
    "output head",
    "vision encoder",
    "other",
)
"""Components in display order. "router" also covers what else an MoE layer has of its own."""

OF_MOE_LAYERS = (
    "router",
    "latent projections",
    "routed experts",
    "zero-computation experts",
    "shared experts",
)
"""The components that stand where a dense model has an FFN."""


@dataclass(frozen=True)
class Cost:
    """Cost of one component, summed over all layers.

    Attributes:
        parameters: number of parameters.
        active: parameters that a token uses, on average.
        forward: forward FLOPs per token, averaged over a sequence.
    """

    parameters: int = 0
    # Floats, because both are averages: over the choices of a token, over a sequence's positions.
    active: float = 0
    forward: float = 0

    @property
    def backward(self) -> float:
        """Backward FLOPs per token, without recomputed activations and without the optimizer."""
        return BACKWARD * self.forward

    @property
    def both(self) -> float:
        """FLOPs per token, forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.active + other.active,
            self.forward + other.forward,
        )


@dataclass(frozen=True)
class Anatomy:
    """A model's components, and the figures needed to compare it with other models.

    Attributes:
        costs: component -> its cost; components that the model lacks are absent.
        dim: model dimension D.
        n_layers: number of layers, of which ``n_moe_layers`` have experts.
        num_experts: routed experts E per layer that compute something; a tuple has each layer's
            number, where they differ.
        zero_experts: zero-computation experts Z per layer.
        top_k: choices per token and layer, among all E + Z; a tuple as above.
        uncounted: classes of modules that have parameters but unknown FLOPs.
        host_flops: the trainer's own FLOPs per token, the basis of its MFU; None if nobody asked.
        ffn_activation: that of dense layers, as in a flavor.
    """

    costs: Mapping[str, Cost]
    dim: int
    n_layers: int
    n_moe_layers: int
    num_experts: int | tuple[int, ...]
    zero_experts: int
    top_k: int | tuple[int, ...]
    uncounted: tuple[str, ...] = ()
    host_flops: float | None = None
    ffn_activation: str = "swiglu"

    @property
    def computing_experts(self) -> float:
        """Experts that compute for a token in one layer, on average; over the layers too."""
        if not (layers := self.n_moe_layers):
            return 0.0
        each_L = zip(sizes_of(self.top_k, layers), sizes_of(self.num_experts, layers), strict=True)
        return fmean(computing_experts(k, E, self.zero_experts) for k, E in each_L)

    @property
    def in_order(self) -> dict[str, Cost]:
        """Component -> cost, in the order of ``COMPONENTS``."""
        return {name: self.costs[name] for name in COMPONENTS if name in self.costs}

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())


@dataclass(frozen=True)
class DenseModel:
    """The same model at equal FLOPs per token, with one dense FFN per layer instead of experts.

    Attributes:
        hidden_dim: hidden size F of that FFN, rounded to the nearest integer.
        cost: cost of the whole model with that F.
    """

    hidden_dim: int
    cost: Cost


def computing_experts(top_k: int, num_experts: int, zero_experts: int) -> float:
    """Return how many experts compute for a token, on average: k E / (E + Z).

    The balance loss is at its optimum when all E + Z are used equally. Then this share of the k
    choices falls on experts that compute (AdaMoE, arXiv 2406.13233; MoE++, arXiv 2410.07348).
    """
    return top_k * num_experts / (num_experts + zero_experts)


def ffn_matrices(activation: str) -> int:
    """Return how many matrices [D, F] an FFN has: up and down, and gate (arXiv 2002.05202)."""
    return 2 if activation in _WITHOUT_GATE else 3


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Return how many keys a token attends to, itself included, averaged over a sequence.

    With a causal mask and a window of W, token i of L (counted from 1) sees min(i, W) keys.

    Args:
        seq_len: tokens L in the sequence.
        window: the most tokens that a token sees, W; None means all earlier ones.
    """
    # Closed form of sum(min(i, W) for i in 1..L) / L: the first W tokens see fewer than W keys.
    seen = seq_len if window is None else min(window, seq_len)
    return seen - seen * (seen - 1) / (2 * seq_len)


def dense_hidden_dim(
    costs: Mapping[str, Cost],
    dim: int,
    n_moe_layers: int,
    matrices: int,
    *,
    equal: Literal["flops", "params"],
) -> int:
    """Return the hidden size F of the FFN that costs as much as what a layer's experts are.

    Its FFN replaces the router and the routed and shared experts, with a gate at ``2 * 3 D F``
    FLOPs per token and ``3 D F`` parameters.

    Args:
        costs: of the model with experts, by component.
        dim: its model dimension D.
        n_moe_layers: the layers that have experts. Dense ones between them keep their FFN.
        matrices: of the FFN: :func:`ffn_matrices`.
        equal: FLOPs per token, or parameters.
    """
    instead = sum((costs.get(name, Cost()) for name in OF_MOE_LAYERS), Cost())
    weights = instead.forward / 2 if equal == "flops" else instead.parameters
    # Rounding F is the only error: at D = 2048 one unit of F is 12288 FLOPs per token and layer.
    return round(weights / (matrices * dim * n_moe_layers))


def dense_model(anatomy: Anatomy) -> DenseModel:
    """Return the dense model with equal FLOPs per token.

    Raises:
        EzpzError: the model has no experts.
    """
    if not anatomy.n_moe_layers:
        raise EzpzError("the model has no layer with experts to compare with a dense one")
    dense = (anatomy.dim, anatomy.n_moe_layers, ffn_matrices(anatomy.ffn_activation))
    hidden_dim = dense_hidden_dim(anatomy.costs, *dense, equal="flops")
    weights = prod(dense) * hidden_dim
    # All weights of a dense FFN are active, so parameters and active parameters are the same.
    rest = sum((cost for name, cost in anatomy.costs.items() if name not in OF_MOE_LAYERS), Cost())
    return DenseModel(hidden_dim, rest + Cost(weights, weights, 2 * weights))
