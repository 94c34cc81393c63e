"""Count a flavor's parameters and FLOPs by component, on its model on the meta device.

Legend of the suffixes: B = batch, L = sequence length, D = model dimension, N = heads, H = head
dimension.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn
from torchtitan.config import ConfigManager
from torchtitan.models.common.attention import BaseAttention
from torchtitan.models.common.moe import MoE

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.routing_schema import Router
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.accounting import Anatomy, Cost, mean_keys
from ezpz_moe.hosts.titan.attention import CausalAttention, left_window
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.hosts.titan.command import named
from ezpz_moe.hosts.titan.components import Choices, choices, weigh
from ezpz_moe.hosts.titan.mixed import written_name
from ezpz_moe.hosts.titan.models import model_spec
from ezpz_moe.hosts.titan.parameters import build_on_meta
from ezpz_moe.hosts.titan.precision import in_words
from ezpz_moe.routing.similarity import multiplied

SCORES = "attention scores"


def anatomy(flavor: Flavor, seq_len: int) -> Anatomy:
    """Return the flavor's components.

    Args:
        flavor: what to build.
        seq_len: tokens per sequence; attention is computed within a sequence.

    Raises:
        EzpzError: the host cannot build the model, or its attention does not show its heads.
    """
    config, model = model_spec(flavor).model, build_on_meta(flavor)
    # Not in `anatomy_of`: the host logs its count, and in a run it has done so already. The first
    # of its two numbers counts parameters, as `weigh` does.
    _, host_flops = config.get_nparams_and_flops(model, seq_len)
    found = anatomy_of(config, model, choices(config, flavor), seq_len)
    return replace(found, host_flops=host_flops, ffn_activation=flavor.ffn_activation)


def anatomy_of(config: Any, model: nn.Module, chosen: Choices, seq_len: int) -> Anatomy:
    """Return the components of a model that is built; it stays as it is.

    Args:
        config: the model's.
        model: whole, on the meta device.
        chosen: what its routers choose from.
        seq_len: tokens per sequence.

    Raises:
        EzpzError: its attention does not show its heads.
    """
    costs, uncounted = weigh(model)
    # `weigh` sees parameters only. The products of queries and keys have none, so they are added
    # here.
    scores = costs.get(SCORES, Cost())
    costs[SCORES] = replace(scores, forward=score_flops(config, attentions(config, model), seq_len))
    if averaging := _averaging_flops(config, seq_len):
        costs["router"] += Cost(forward=averaging)
    return Anatomy(
        costs=costs,
        dim=config.dim,
        n_layers=len(config.layers),
        n_moe_layers=sum(isinstance(module, MoE) for module in model.modules()),
        num_experts=chosen.num_experts,
        zero_experts=chosen.zero_experts,
        top_k=chosen.top_k,
        uncounted=tuple(uncounted),
    )


def sequence_length(config: str, host_flags: list[str]) -> int:
    """Return the tokens per sequence of a job, after the trainer's own flags.

    Raises:
        EzpzError: the job is wrong. A flag that the trainer does not know ends the process.
    """
    trainer_config = ConfigManager().parse_args([*named(config), *host_flags])
    return attrgetter(titan().LENGTH)(trainer_config)


def precision_in_words(config: str, host_flags: list[str], flavor: Flavor) -> str:
    """Describe the precision of a job, after the trainer's own flags.

    Raises:
        EzpzError: as :func:`sequence_length`.
    """
    return in_words(ConfigManager().parse_args([*named(config), *host_flags]))


def score_flops(config: Any, attentions: list[Attention], seq_len: int) -> float:
    """Return forward FLOPs per token in all layers: queries with keys, and the sum of values."""
    windows = {
        path: left_window(node) for path, node, _, _ in config.traverse(BaseAttention.Config)
    }
    flops = 0.0
    for each in attentions:
        # The window is stored in the attention's config and not in the module. Both trees have
        # the same paths. It counts earlier tokens; mean_keys also counts the token itself.
        window = None if windows[each.path] < 0 else windows[each.path] + 1
        # 2 FLOPs for a multiplication and an addition.
        flops += 2 * each.heads * (each.qk_dim + each.v_dim) * mean_keys(seq_len, window)
    return flops


def _averaging_flops(config: Any, seq_len: int) -> float:
    """Return forward FLOPs per token in all layers: cosines of tokens, and means of scores."""
    flops = 0.0
    for _, moe, _, _ in config.traverse(MoE.Config):
        # The host's own router has no settings.
        similarity = getattr(moe.router, "settings", Router()).similarity
        if similarity.strength:
            each = partial(multiplied, seq_len, similarity.window)
            flops += 2 * (each(config.dim) + each(moe.router.num_experts)) / seq_len
    return flops


class Attention(NamedTuple):
    """What an attention gives its kernel."""

    path: str
    heads: int
    """Query heads."""
    qk_dim: int
    """Numbers of a head's query and key."""
    v_dim: int
    """Numbers of a head's value."""
    holds_scores: bool
    """Whether every score is in memory, as no fused kernel has it."""


def attentions(config: Any, model: nn.Module) -> list[Attention]:
    """Return all attentions of a model on the meta device, in its order.

    Raises:
        EzpzError: one does not show its heads.
    """
    return [
        _looked_at(module, path, config.dim)
        for path, module in model.named_modules()
        if isinstance(module, BaseAttention)
    ]


class _Seen(Exception):
    """Ends an attention's forward just before it calls its kernel."""


def _looked_at(attention: nn.Module, path: str, dim: int) -> Attention:
    """Return what an attention's kernel is called with.

    No attribute has this under the same name in all models, but the kernel's inputs q, k and v
    [..., N, H] do.
    """

    def look(_: nn.Module, tensors: tuple[torch.Tensor, ...], words: dict[str, Any]) -> None:
        raise _Seen(tensors, words)

    # A class of attention outside of the host's own models may keep its kernel elsewhere.
    kernel = getattr(attention, "inner_attention", None)
    if kernel is None:
        raise _unknown(path, attention)
    handle = kernel.register_forward_pre_hook(look, with_kwargs=True)
    try:
        # One token on the meta device is enough: only shapes matter. In the dtype of the weights:
        # the meta device multiplies two dtypes, but norms warn of them in the run's log.
        dtype = next(attention.parameters()).dtype
        attention(torch.empty(*titan().one_sequence(1), dim, dtype=dtype, device="meta"), None)
    except _Seen as seen:
        (q, _, v), words = seen.args
        holds_scores = isinstance(kernel, CausalAttention) and kernel.holds_scores(**words)
        return Attention(path, q.shape[-2], q.shape[-1], v.shape[-1], holds_scores)
    finally:
        handle.remove()
    raise _unknown(path, attention)


def _unknown(path: str, attention: nn.Module) -> EzpzError:
    return EzpzError(
        f"{path}: {written_name(type(attention))} has no inner_attention that receives its "
        "queries, keys and values, so their FLOPs cannot be determined"
    )
