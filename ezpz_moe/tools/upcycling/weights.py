"""The weights of an upcycled layer, as functions of the dense FFN's.

Legend of the suffixes: E = experts, F = hidden dimension of an expert, H = hidden dimension of the
dense FFN, D = model dimension, G = H / F, the parts that the dense FFN is split into.

The FFN is SwiGLU, ``w2 (silu(w1 x) * w3 x)``, a sum over its hidden channels: w1 and w3 [H, D]
hold a channel in a row, w2 [D, H] in a column. Split into G groups of channels, it is the sum of G
experts.

Every random tensor has its own generator, by seed, tensor and expert: each can be computed
again by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Perturbation:
    """What makes the copies differ.

    Attributes:
        noise: standard deviation of Gaussian noise, in units of the weight's own.
        reinit: share of an expert's hidden channels that is redrawn.
        router_std: standard deviation of the router's weights.
        seed: for all random draws.
    """

    noise: float = 0.0
    reinit: float = 0.0
    router_std: float = 0.02
    seed: int = 0

    @property
    def is_none(self) -> bool:
        """Whether every expert is an exact copy."""
        return not (self.noise or self.reinit)


def mean(models: Sequence[torch.Tensor]) -> torch.Tensor:
    """Average a weight of several models: summed in float64, rounded to their dtype.

    Where all are equal the mean has their bits, for any number of models.

    Args:
        models: the weight in each model, of one shape and dtype; at least one.

    Returns:
        The mean, of the same shape and dtype.
    """
    first, *others = models
    if not others:
        return first
    total, agree = first.double(), torch.ones_like(first, dtype=torch.bool)
    for each in others:
        total += each
        agree &= each == first
    # Three equal float64, added and divided by 3, may be another number.
    return torch.where(agree, first, (total / len(models)).to(first.dtype))


def experts(
    models: Sequence[torch.Tensor],
    layer: str,
    part: str,
    *,
    num_experts: int,
    granularity: int,
    scale: float,
    perturbation: Perturbation,
) -> torch.Tensor:
    """Make the routed experts' w1, w2 or w3: copies of the dense FFNs', or of their parts in turn.

    Sparse upcycling, arXiv 2212.05055; with ``granularity`` > 1 its fine-grained form with virtual
    groups, arXiv 2410.07524: expert e is part e mod G, so experts cG to cG + G - 1 together are
    copy c of a dense FFN. Of n models, copy c is from model c mod n (BAM, arXiv 2408.08274;
    Branch-Train-MiX, arXiv 2403.07816).

    Args:
        models: of each model w1 or w3 [H, D], or w2 [D, H], of one floating dtype.
        layer: its name, which seeds the random numbers.
        part: "w1", "w2" or "w3".
        num_experts: E.
        granularity: G, which divides H and E.
        scale: factor on w2; w1 and w3 have none.
        perturbation: what makes the copies differ.

    Returns:
        [E, F, D], or [E, D, F] for w2, in the dense weights' dtype.
    """
    channel_dim = 1 if part == "w2" else 0
    # A row for each model, a column for each part.
    parts = [each.chunk(granularity, dim=channel_dim) for each in models]
    # Only the stack is in the dense dtype: noise and factors are applied in float32, expert by
    # expert, and rounded once.
    written = torch.empty((num_experts, *parts[0][0].shape), dtype=parts[0][0].dtype)
    for e in range(num_experts):
        copy = e // granularity
        expert = _wide(parts[copy % len(models)][e % granularity])
        if perturbation.noise:
            draw = torch.randn(
                expert.shape,
                generator=generator(perturbation.seed, layer, part, e, "noise"),
                dtype=expert.dtype,
            )
            # Relative to the weight's own spread: layers differ in it by orders of magnitude.
            expert = expert + perturbation.noise * expert.std() * draw
        if perturbation.reinit:
            expert = reinitialized(expert, layer, part, e, perturbation)
        # The FFN is linear in w2, so a factor there scales the whole expert.
        written[e] = expert * scale if part == "w2" else expert
    return written


def reinitialized(
    expert: torch.Tensor, layer: str, part: str, e: int, perturbation: Perturbation
) -> torch.Tensor:
    """Redraw a share of the hidden channels of an expert's weight.

    Drop-Upcycling, arXiv 2502.19261, section 3: the channels are the same in w1, w2 and w3, and the
    new values are Gaussian with the mean and standard deviation of those that they replace.
    """
    channel_dim = 1 if part == "w2" else 0
    count = int(expert.shape[channel_dim] * perturbation.reinit)
    if not count:
        return expert
    # Without `part` in the key: w1, w2 and w3 redraw the same channels.
    order = generator(perturbation.seed, layer, e, "channels")
    channels = torch.randperm(expert.shape[channel_dim], generator=order)[:count]
    dropped = expert.index_select(channel_dim, channels)
    draw = torch.randn(
        dropped.shape,
        generator=generator(perturbation.seed, layer, part, e, "reinit"),
        dtype=expert.dtype,
    )
    # Mean and deviation of the dropped values only: the rest of the expert is not touched.
    return expert.index_copy(channel_dim, channels, dropped.mean() + dropped.std() * draw)


def router(
    shape: torch.Size, layer: str, *, granularity: int, perturbation: Perturbation
) -> torch.Tensor:
    """Draw the router's weight [E, D], float32, Gaussian: equal rows for the G parts of a copy.

    Equal rows give the parts equal scores, so a token chooses whole copies of the dense FFN.
    """
    copies = shape[0] // granularity
    draw = torch.randn(
        (copies, *shape[1:]), generator=generator(perturbation.seed, layer, "router")
    )
    # Neighbours, because experts cG to cG + G - 1 are the parts of copy c.
    return (perturbation.router_std * draw).repeat_interleave(granularity, dim=0)


def like(
    dense: torch.Tensor, shape: torch.Size, layer: str, part: str, *, seed: int
) -> torch.Tensor:
    """Draw a weight with the dense one's mean and standard deviation, in its dtype."""
    wide = _wide(dense)
    draw = torch.randn(shape, generator=generator(seed, layer, part, "shared"), dtype=wide.dtype)
    return (wide.mean() + wide.std() * draw).to(dense.dtype)


def generator(seed: int, *key: object) -> torch.Generator:
    """Make a separate generator for ``key``, the same on every machine."""
    # Not hash(), which Python seeds anew in every process.
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    # One bit less keeps the seed within a signed 64-bit integer.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to at least float32, which sums and factors need."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
