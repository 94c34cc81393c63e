"""Assign each module of a model to a component, and count what it costs.

A module belongs to the component of the nearest enclosing class of the host's (``MoE``,
``BaseAttention``, ``FeedForward``, ...), so no model needs a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchtitan.models.common.attention import BaseAttention
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.moe import MoE

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.layer_sizes import one_or_each
from ezpz_moe.hosts.accounting import Cost
from ezpz_moe.hosts.titan.mixed import written_name

_ZERO_COMPUTATION = "zero-computation experts"
_LATENT = "latent projections"
_NORMS = (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Choices:
    """What a token chooses in a layer: ``top_k`` of ``num_experts + zero_experts``.

    A tuple has each layer's, where they differ.
    """

    num_experts: int | tuple[int, ...]
    zero_experts: int
    top_k: int | tuple[int, ...]


def choices(config: Any, flavor: Flavor) -> Choices:
    """Return the choices of a flavor's token: the model's own, and those that ``[router]`` adds.

    In a dense model a token has none.

    Args:
        config: the flavor's model, with its routers.
        flavor: for its ``[router]``.
    """
    if flavor.is_dense:
        return Choices(num_experts=0, zero_experts=0, top_k=0)
    zero_experts = flavor.router.zero_computation_experts
    routers = [moe.router for _, moe, _, _ in config.traverse(MoE.Config)]
    return Choices(
        num_experts=one_or_each([router.num_experts - zero_experts for router in routers]),
        zero_experts=zero_experts,
        top_k=one_or_each([router.top_k for router in routers]),
    )


def weigh(model: nn.Module) -> tuple[dict[str, Cost], list[str]]:
    """Count parameters and matrix products of every component, except attention scores.

    Args:
        model: on any device, whole.

    Returns:
        The costs by component, and the classes of modules that have parameters but unknown FLOPs. A
        parameter that two modules share counts once, its products count for both.
    """
    costs: dict[str, Cost] = defaultdict(Cost)
    shares = _computing_shares(model)
    seen: set[nn.Parameter] = set()
    unknown = set()
    for module, component in components(model):
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        share = shares[module] if component == "routed experts" else 1
        number = sum(parameter.numel() for parameter in own)
        # A parameter of the attention module itself can only be gpt_oss's sinks, which are added to
        # the scores. Its projections are modules of their own.
        is_sink = isinstance(module, BaseAttention)
        where = "attention scores" if is_sink else component
        forward = 2 * share * _multiplied(module, component)
        if number or forward:
            costs[where] += Cost(number, share * number, forward)
        # Free: a lookup or elementwise work, no matrix product. Anything else that has parameters
        # but no known product is reported, instead of counting as zero.
        is_free = is_sink or isinstance(module, (nn.Embedding, *_NORMS))
        if own and not (forward or is_free or component == "vision encoder"):
            unknown.add(written_name(type(module)))
    return dict(costs), sorted(unknown)


def _computing_shares(model: nn.Module) -> dict[nn.Module, float]:
    """Return of each module of routed experts what share computes for a token, on average.

    All choices of a router count, those of zero-computation experts too.
    """
    return {
        module: moe.router.top_k / moe.router.num_experts
        for moe in model.modules()
        if isinstance(moe, MoE)
        for module in moe.routed_experts.modules()
    }


def components(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every module below ``model`` with its component."""
    # By name: the head is a plain linear layer, and every vision encoder has a class of its own.
    names = {"lm_head": "output head", "vision_encoder": "vision encoder"}
    yield from _below(model, "other", names)


def _below(
    module: nn.Module, around: str, names: dict[str, str]
) -> Iterator[tuple[nn.Module, str]]:
    """Yield modules below ``module``; ``names`` maps its children's names to components."""
    yield module, around
    for name, child in module.named_children():
        yield from _below(child, names.get(name) or _component(child, around), _named_in(child))


def _named_in(module: nn.Module) -> dict[str, str]:
    if isinstance(module, MoE):
        return {"routed_experts": "routed experts", "shared_experts": "shared experts"}
    if isinstance(module, BaseAttention):
        return {"inner_attention": "attention scores"}
    # No other module has one of these names.
    return {"constant_experts": _ZERO_COMPUTATION, "descend": _LATENT, "ascend": _LATENT}


def _component(module: nn.Module, around: str) -> str:
    if around == "vision encoder":  # whatever is inside it: it works on patches, not on tokens
        return around
    match module:
        case nn.Embedding():
            return "embeddings"
        case nn.RMSNorm() | nn.LayerNorm() | nn.GroupNorm():
            return "norms"
        case BaseAttention():
            return "attention projections"
        case MoE():
            return "router"
        case FeedForward() if around != "shared experts":
            return "dense FFN"
    return around


def _multiplied(module: nn.Module, component: str) -> int:
    """Return how many of the module's own weights are multiplied with a token."""
    if component == "vision encoder":
        return 0
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    if component == _ZERO_COMPUTATION:  # every token uses all of them
        return sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if component == "routed experts":  # weights are [E, ..., out, in], biases [E, ..., out]
        own = module.named_parameters(recurse=False)
        return sum(p.numel() for name, p in own if p.dim() > 2 and "bias" not in name)
    return 0
