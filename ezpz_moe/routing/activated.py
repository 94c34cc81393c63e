"""Routing by ReLU: a token uses every expert whose activation is not 0, however many they are.

Source: BlockFFN, arXiv 2507.08771, section 3.1; https://github.com/thunlp/BlockFFN.

A trainer wants the same number of choices of every token, so there are E: the experts that a token
uses, and as often as others are left the id E, which no expert has.

Legend of the suffixes: :mod:`ezpz_moe.routing`; E1 = E + 1; here K = E.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ezpz_moe.routing.assignment import HostRules, weights_of


def every_active(scores_BLE: Tensor, rules: HostRules) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights_BLK, ids_BLK and scores_BLE1 of the experts with a score.

    Args:
        scores_BLE: the gate's activations; 0 where an expert is not used.
        rules: what the host's router does with a token's weights.

    Returns:
        The weights, differentiable in the scores and 0 for the id E; int64 ids in ascending order;
        the scores with a column of zeros, for who looks up those of an id.
    """
    E = scores_BLE.shape[-1]
    experts_E = torch.arange(E, device=scores_BLE.device)
    # Not "above 0": a learned scale may be negative, and a NaN must reach the loss.
    ids_BLK = torch.where(scores_BLE != 0, experts_E, E)
    # By topk, whose result activation checkpointing keeps: a recomputed score that rounds across 0
    # would change how many rows the experts get.
    ids_BLK = ids_BLK.topk(E, dim=-1, largest=False).values
    scores_BLE1 = F.pad(scores_BLE, (0, 1))
    return weights_of(scores_BLE1, ids_BLK, rules), ids_BLK, scores_BLE1
