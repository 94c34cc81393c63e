"""Experts that cost nothing: null, copy and constant ones, numbered after the routed experts.

A null expert outputs zero, a copy expert its input, a constant expert a learned mix of its input
and a learned vector. Sources: AdaMoE, arXiv 2406.13233 (null experts); MoE++, arXiv 2410.07348
(zero, copy and constant experts, equations 3 to 5).

Legend of the suffixes: :mod:`ezpz_moe.routing`; C = constant experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weight_of(weights_BLK: Tensor, ids_BLK: Tensor, first: int, last: int) -> Tensor:
    """weight_BL1: the weight that a token gives to the experts ``first`` to ``last`` - 1."""
    chosen_BLK = (ids_BLK >= first) & (ids_BLK < last)
    return torch.where(chosen_BLK, weights_BLK, 0).sum(-1, keepdim=True)


def constant_output(
    x_BLD: Tensor, weight_BLC: Tensor, mix_C2D: Tensor, vectors_CD: Tensor
) -> Tensor:
    """y_BLD: the sum of the constant experts' outputs, each times its weight.

    Expert c outputs ``a x + b v_c`` with ``(a, b) = softmax(mix_c x)``.
    """
    mix_BLC2 = torch.einsum("...d,cmd->...cm", x_BLD, mix_C2D.to(x_BLD.dtype)).softmax(-1)
    shares_BLC2 = weight_BLC.unsqueeze(-1) * mix_BLC2
    of_input_BL1 = shares_BLC2[..., 0].sum(-1, keepdim=True)
    of_vectors_BLD = shares_BLC2[..., 1].to(x_BLD.dtype) @ vectors_CD.to(x_BLD.dtype)
    return x_BLD * of_input_BL1.to(x_BLD.dtype) + of_vectors_BLD
