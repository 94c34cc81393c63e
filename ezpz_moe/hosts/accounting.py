"""What a model costs: parameters and FLOPs of a token, by component. Numbers only, no torch.

FLOPs are those of matrix products, 2 for a multiplication with its addition; backward costs twice
the forward, because each product has two gradients. docs/describe.md has the definitions.

Legend: E = experts, k = experts of a token, Z = zero-computation experts, D = model dimension,
F = hidden size of an FFN, L = tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ezpz_moe.errors import EzpzError

BACKWARD = 2
"""FLOPs of backward for one of forward: the gradient of a product's weight, and of its input."""

FFN_MATRICES = 3
"""Of a gated FFN (SwiGLU, arXiv 2002.05202): gate, up and down, D x F each."""

COMPONENTS = (
    "embeddings",
    "attention projections",
    "attention scores",
    "router",
    "routed experts",
    "zero-computation experts",
    "shared experts",
    "dense FFN",
    "norms",
    "output head",
    "vision encoder",
    "other",
)
"""In the order in which they are shown. Router is also what else is in a layer with experts."""

OF_MOE_LAYERS = ("router", "routed experts", "zero-computation experts", "shared experts")
"""The components that stand where a dense model has an FFN."""


@dataclass(frozen=True)
class Cost:
    """What one component costs, all its layers together.

    Attributes:
        parameters: number of parameters.
        active: those that a token meets, on average.
        forward: FLOPs of a token, on average over a sequence.
    """

    parameters: int = 0
    active: float = 0
    forward: float = 0

    @property
    def backward(self) -> float:
        """FLOPs of a token; recomputed activations and the optimizer are not in it."""
        return BACKWARD * self.forward

    @property
    def both(self) -> float:
        """FLOPs of a token, forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.active + other.active,
            self.forward + other.forward,
        )


@dataclass(frozen=True)
class Anatomy:
    """A model's components, and what else is needed to compare it.

    Attributes:
        costs: component -> its cost; components that the model lacks are absent.
        dim: model dimension D.
        n_layers: number of layers, of which ``n_moe_layers`` have experts.
        num_experts: routed experts E of a layer that compute.
        zero_experts: zero-computation experts Z of a layer.
        top_k: choices of a token in a layer, of all E + Z.
        host_flops: the trainer's own count of a token's FLOPs, which its MFU is made of.
        uncounted: kinds of modules with parameters whose FLOPs are not known.
    """

    costs: Mapping[str, Cost]
    dim: int
    n_layers: int
    n_moe_layers: int
    num_experts: int
    zero_experts: int
    top_k: int
    host_flops: float
    uncounted: tuple[str, ...] = ()

    @property
    def computing_experts(self) -> float:
        """Of a token in a layer, on average."""
        return computing_experts(self.top_k, self.num_experts, self.zero_experts)

    @property
    def total(self) -> Cost:
        return sum(self.costs.values(), Cost())


@dataclass(frozen=True)
class DenseModel:
    """The same model with one gated FFN for the experts of each layer, at equal FLOPs per token.

    Attributes:
        hidden_dim: the FFN's hidden size F, rounded to the nearest whole one.
        cost: the whole model's, with that F.
    """

    hidden_dim: int
    cost: Cost


def computing_experts(top_k: int, num_experts: int, zero_experts: int) -> float:
    """Experts that compute for a token, on average: k E / (E + Z).

    The balance loss is at its optimum when all E + Z are used alike, and then this share of the k
    choices is of experts that compute (AdaMoE, arXiv 2406.13233; MoE++, arXiv 2410.07348).
    """
    return top_k * num_experts / (num_experts + zero_experts)


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a token attends to, itself included, on average over a sequence.

    Token i of L has min(i, W) keys under a causal mask with a window of W, i from 1.

    Args:
        seq_len: tokens of the sequence L.
        window: tokens that are seen at most, W; None: all before.
    """
    seen = seq_len if window is None else min(window, seq_len)
    return seen - seen * (seen - 1) / (2 * seq_len)


def dense_model(anatomy: Anatomy) -> DenseModel:
    """The dense model of equal FLOPs per token.

    Its FFN does what router, routed and shared experts of a layer do: ``2 * 3 D F`` per token.

    Raises:
        EzpzError: the model has no experts.
    """
    if not anatomy.n_moe_layers:
        raise EzpzError("the model has no layer with experts to compare with a dense one")
    instead = sum((anatomy.costs.get(name, Cost()) for name in OF_MOE_LAYERS), Cost())
    per_hidden_unit = FFN_MATRICES * anatomy.dim * anatomy.n_moe_layers
    hidden_dim = round(instead.forward / (2 * per_hidden_unit))
    weights = per_hidden_unit * hidden_dim
    rest = sum((cost for name, cost in anatomy.costs.items() if name not in OF_MOE_LAYERS), Cost())
    return DenseModel(hidden_dim, rest + Cost(weights, weights, 2 * weights))
