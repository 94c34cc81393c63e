"""Scores on the inputs of experts: ``router_scores = "before"``.

torchtitan 0.3 adds up score * FFN(x). Its 0.2 and llama4 add up FFN(score * x), which is another
model, as an FFN is not linear. Here the host's dispatcher multiplies a row where it gathers it,
before any rank sends it, and has nothing left to multiply afterwards.

Legend of the suffixes: N = choices that are computed, T = tokens, K = top-k, D = width of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.moe import MoE

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.titan.dispatchers import SORTING, host_class
from ezpz_moe.hosts.titan.mixed import mixed


class ScoresBefore:
    """Mixin before a dispatcher of the host: it multiplies rows by their scores as it sorts."""

    scores_before = True

    def _local_reorder(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reorder as the host does; the scores that are left are ones."""
        reorder = super()._local_reorder  # type: ignore[misc]
        x_ND, token_N, scores_N = reorder(x_TD, topk_scores_TK, topk_expert_ids_TK)
        # In float32, as the host multiplies outputs, and torchtitan 0.2 inputs.
        weighted_ND = (x_ND.float() * scores_N.unsqueeze(-1)).to(x_ND.dtype)
        return weighted_ND, token_N, torch.ones_like(scores_N)


def score_inputs(model: Any, where: str) -> None:
    """Have every dispatcher of a model's config apply the scores before the experts, in place.

    Raises:
        EzpzError: a dispatcher applies scores where its kernels add rows up; ``where`` is who asks.
    """
    for _, moe, _, _ in model.traverse(MoE.Config):
        dispatcher = moe.routed_experts.token_dispatcher
        if (own := host_class(dispatcher)) not in SORTING:
            raise EzpzError(
                f'{where}: router_scores = "before": {own} multiplies outputs where it combines '
                'them. Set parallelism.expert_parallel_comm_backend to "standard", or remove '
                "router_scores."
            )
        before = mixed(type(dispatcher)._owner, ScoresBefore)
        moe.routed_experts.token_dispatcher = derive(dispatcher, before.Config)
