"""The sizes of one expert layer: a known model's, scaled down if asked, or explicit ones.

This module does not import torch.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`. T = tokens, K = experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from ezpz_moe.errors import EzpzError, did_you_mean
from ezpz_moe.hosts.accounting import ffn_matrices


class ModelSizes(NamedTuple):
    """A known model: experts, experts of a token, model and expert dimension."""

    E: int
    K: int
    D: int
    F: int


MODELS = {
    "olmoe": ModelSizes(64, 8, 2048, 1024),
    "qwen3_30b": ModelSizes(128, 8, 2048, 768),
    "deepseek_v2_lite": ModelSizes(64, 6, 2048, 1408),
    "mixtral": ModelSizes(8, 2, 4096, 14336),
    "10b_2b": ModelSizes(36, 3, 2048, 1408),
    "7b": ModelSizes(36, 3, 2048, 1280),
    "deepseek_v3": ModelSizes(256, 8, 7168, 2048),
}


@dataclass(frozen=True)
class Shape:
    """One layer: E experts of dimension F over R routed rows of dimension D.

    Attributes:
        name: for example "olmoe/4": D, F and the tokens are divided by 4.
        K: experts of a token, which only a routed layer knows of: R = T K.
        activation: of the experts' FFN.
        biased: whether its products have biases.
    """

    name: str
    E: int
    D: int
    F: int
    R: int
    K: int = 1
    activation: str = "swiglu"
    biased: bool = False

    def of_ffn(self, activation: str, *, biased: bool) -> Shape:
        """Return the same sizes with another FFN, which its name says unless it is plain."""
        words = [self.name, *([activation] * (activation != "swiglu")), *(["biases"] * biased)]
        return replace(self, name=" ".join(words), activation=activation, biased=biased)

    @property
    def is_plain(self) -> bool:
        """Whether it is SwiGLU without biases, the only FFN that other projects' layers compute."""
        return self.activation == "swiglu" and not self.biased

    @property
    def T(self) -> int:
        return self.R // self.K

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.E, self.D, self.F, self.R

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward: with a gate 6 R D F and 12 R D F, else 4 and 8."""
        # A product is 2 R D F; backward computes two for each of them.
        return 6 * ffn_matrices(self.activation) * self.R * self.D * self.F


def parse_shape(text: str, *, scale: int, tokens: int) -> Shape:
    """Parse ``"olmoe"``, with D, F and ``tokens`` divided by ``scale``, or ``"8,1024,3584,2048"``.

    Raises:
        EzpzError: neither a known model nor E,D,F,R or E,D,F,R,K; or ``scale`` does not divide a
            size.
    """
    if "," in text:
        return _explicit(text)
    if text not in MODELS:
        raise EzpzError(
            f"--shape {text!r}: unknown model. Known: {', '.join(MODELS)}; or give the sizes as "
            f"E,D,F,R or E,D,F,R,K, for example 8,1024,3584,2048.{did_you_mean(text, MODELS)}"
        )
    model = MODELS[text]
    for name, size in (("D", model.D), ("F", model.F), ("--tokens", tokens)):
        if size % scale or size < scale:
            raise EzpzError(
                f"--shape {text} --scale {scale}: {name} = {size} is not a multiple of {scale}. "
                f"Choose a scale that divides D = {model.D}, F = {model.F} and the {tokens} tokens."
            )
    D, F, T = (size // scale for size in (model.D, model.F, tokens))
    return Shape(text if scale == 1 else f"{text}/{scale}", model.E, D, F, T * model.K, model.K)


def _explicit(text: str) -> Shape:
    parts = text.split(",")
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) not in (4, 5) or min(sizes) < 1:
        raise EzpzError(
            f"--shape {text!r}: explicit sizes are four numbers above 0, E,D,F,R: experts, model "
            f"dimension, expert dimension and routed rows, for example 8,1024,3584,2048; with "
            f"--layer routed a fifth, K, is how many experts a token has."
        )
    E, D, F, R, K = (*sizes, 1)[:5]
    shape = Shape(",".join(map(str, sizes)), E, D, F, R, K)
    if shape.K > shape.E or shape.R % shape.K:
        raise EzpzError(
            f"--shape {text!r}: K = {shape.K} experts of a token must be at most E = {shape.E} "
            f"and divide the R = {shape.R} rows."
        )
    return shape
