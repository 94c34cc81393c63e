"""Tell routers which documents their tokens are of: what ``[router] similarity`` needs.

A router sees the hidden state of tokens alone. Their positions, which begin at 0 in each document,
reach the blocks of layers, in every stage of a pipeline and once more where one is recomputed. So a
block is a subclass that hands them to its router.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torchtitan.config.override import derive
from torchtitan.models.common.decoder import TransformerBlock

from ezpz_moe.config.similarity_schema import Similarity
from ezpz_moe.hosts.titan.mixed import named_after
from ezpz_moe.routing.similarity import averaged, documents_of

UNTOLD = "untold"
"""What a router has for positions until its block has handed it some, or None."""


def tell_documents(model: Any) -> None:
    """Have the blocks of a model's config hand positions to their routers, in place."""
    # A list, because the loop replaces nodes of the tree that is traversed.
    for _, block, parent, place in list(model.traverse(TransformerBlock.Config)):
        if block.moe is not None:
            telling = derive(block, _telling(type(block)._owner).Config)
            if isinstance(parent, list):
                parent[place] = telling
            else:
                setattr(parent, place, telling)


@cache
def _telling(host_class: type[TransformerBlock]) -> Any:
    # By their place: the host's models hand positions over without a name.
    place = list(signature(host_class.forward).parameters).index("positions") - 1  # without self

    class TellingBlock(host_class):
        @dataclass(kw_only=True, slots=True)
        class Config(host_class.Config):  # type: ignore[name-defined]
            pass

        # The host asks for the names of forward's arguments.
        @wraps(host_class.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            given = args[place] if len(args) > place else kwargs.get("positions")
            self.moe.router.positions = given
            return super().forward(*args, **kwargs)

    return named_after(TellingBlock, host_class)


def averaged_scores(
    scores_BLE: Tensor, x_BLD: Tensor, positions_BL: Any, settings: Similarity
) -> Tensor:
    """Return the scores averaged over similar earlier tokens.

    Args:
        scores_BLE: or [T, E], where the host folds sequences.
        x_BLD: the router's input.
        positions_BL: of each token in its document; None if a sequence is one document, as it is
            for the host's attention then.
        settings: the flavor's.

    Raises:
        ValueError: nobody has told the router of positions, or they are not those of its tokens.
    """
    if positions_BL is UNTOLD:
        raise ValueError(
            "[router] similarity: the router has not been told of its tokens' documents. It works "
            "in a model whose blocks are the flavor's, not by itself"
        )
    if positions_BL is None:
        positions_BL = torch.arange(scores_BLE.shape[-2], device=scores_BLE.device)
        positions_BL = positions_BL.expand(scores_BLE.shape[:-1])
    if positions_BL.shape != scores_BLE.shape[:-1]:
        raise ValueError(
            f"[router] similarity needs a position for each of {tuple(scores_BLE.shape[:-1])} "
            f"tokens, not {tuple(positions_BL.shape)}"
        )
    if is_folded := scores_BLE.dim() == 2:  # every sequence begins a document
        scores_BLE, x_BLD, positions_BL = (
            each.unsqueeze(0) for each in (scores_BLE, x_BLD, positions_BL)
        )
    found_BLE = averaged(scores_BLE, x_BLD, documents_of(positions_BL), settings)
    return found_BLE.squeeze(0) if is_folded else found_BLE
