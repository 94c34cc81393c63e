"""The host's routed layer as one node: dispatch, experts and combination by the backend.

The host's ``RoutedExperts`` gathers a row for each choice, has its experts compute the rows, and
adds up what they return. As one node it hands its tokens and the router's choices to the experts,
whose backend does all of that and keeps two [R, F] for backward. The call goes through the experts
module: a trainer that shards or gathers weights does so around it.

With expert parallelism, tokens go to other ranks and back around it: :mod:`.expert_parallel`.
Parameters, state-dict keys and the layout of inputs and gradients are the host's.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`; X = what a tensor has before its last
dimension: batch and length, or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple

from torch import Tensor
from torchtitan.distributed.spmd_types import maybe_set_sparse_mesh
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from ezpz_moe.compute import get_backend
from ezpz_moe.config.flavor_schema import Routed
from ezpz_moe.hosts.backends import HOST_PATH, ExpertComputeBackend
from ezpz_moe.hosts.titan.expert_parallel import across_ranks
from ezpz_moe.hosts.titan.mixed import named_after, written_name


class Choices(NamedTuple):
    """What a backend dispatches by.

    Attributes:
        scores_TK: weights of each token's experts.
        ids_TK: each token's experts.
        num_rows: R: so many choices, those with the lowest ids, are computed.
    """

    scores_TK: Tensor
    ids_TK: Tensor
    num_rows: int


def why_composed(
    config: RoutedExperts.Config, backend: ExpertComputeBackend, routed: Routed
) -> str | None:
    """Return why the layer cannot be, or is not to be, one node; None if it can.

    Args:
        config: the host's node, before a backend is selected.
        backend: what is selected.
        routed: the flavor's.
    """
    if routed == "composed":
        return "asked for"
    layer, experts, dispatcher = (
        type(node)._owner for node in (config, config.inner_experts, config.token_dispatcher)
    )
    if experts is not GroupedExperts:
        return f"{written_name(experts)} computes another FFN than SwiGLU"
    if layer.forward is not RoutedExperts.forward:
        return f"{written_name(layer)} has a forward of its own"
    if getattr(dispatcher, "scores_before", False):
        return "scores are applied to the inputs of experts"
    if not _sorts_as_the_host(dispatcher):
        return f"{written_name(dispatcher)} sorts and sends tokens in its own way"
    if backend != HOST_PATH and not get_backend(backend).has_routed_kernel:
        return f"{backend} has no kernel for it"
    return None


def _sorts_as_the_host(dispatcher: type[LocalTokenDispatcher]) -> bool:
    """Return whether, without expert parallelism, it does what :func:`.row_order` relies on."""
    known = (LocalTokenDispatcher, AllToAllTokenDispatcher)
    methods = ("dispatch", "combine", "_local_reorder")
    return all(
        getattr(dispatcher, method) in [getattr(each, method) for each in known]
        for method in methods
    )


@cache
def as_one_node(host_class: type[RoutedExperts]) -> Any:
    """Return ``host_class`` as one node; its experts are ``EzpzGroupedExperts``."""

    # Cached above: layers of one class would otherwise get a new class each.
    class OneNode(host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            pass

        # The host looks up the shardings of inputs by the names of its own parameters, which differ
        # between its generations.
        @wraps(host_class.forward)
        def forward(self, *inputs: Tensor) -> Tensor:
            x_XD, scores_XK, ids_XK, counts_E = inputs
            x_TD, scores_TK, ids_TK = (each.flatten(0, -2) for each in (x_XD, scores_XK, ids_XK))
            tokens = (x_TD, scores_TK, ids_TK, counts_E)
            if _is_expert_parallel(self):
                out_TD = across_ranks(self.token_dispatcher, self._on_rank, *tokens)
            else:
                out_TD = self._on_rank(*tokens, self._num_rows(ids_TK))
            return out_TD.view(x_XD.shape)

        def _on_rank(
            self,
            x_TD: Tensor,
            scores_TK: Tensor,
            ids_TK: Tensor,
            counts_E: Tensor,
            num_rows: int,
        ) -> Tensor:
            choices = Choices(scores_TK, ids_TK, num_rows)
            with maybe_set_sparse_mesh():  # as the host does while its experts compute
                return self.inner_experts(x_TD, counts_E, choices=choices)

        def _num_rows(self, topk_expert_ids_TK: Tensor) -> int:
            """Return R. Whoever leaves choices out replaces this method."""
            return topk_expert_ids_TK.numel()

    return named_after(OneNode, host_class)


def _is_expert_parallel(layer: RoutedExperts) -> bool:
    # The host's dispatcher for expert parallelism gets its mesh when the model is parallelized, and
    # sorts locally without one. The plain local one has no such attribute.
    return getattr(layer.token_dispatcher, "ep_mesh", None) is not None
