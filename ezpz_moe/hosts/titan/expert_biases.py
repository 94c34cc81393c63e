"""Biases of routed experts, under the trainer's parallelisms.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import spmd_types as spmd
from torch import Tensor
from torch.autograd import Function


def with_biases(config: Any) -> Any:
    """Return the host's ``ShardingConfig`` of the experts' weights, with their biases.

    A bias is sharded as the output of its product: b1 and b3 over F as w1 is. b2 has no F, so that
    every rank of a tensor-parallel group has all of it, and finds its whole gradient (``spmd.I``;
    with ``spmd.R`` the trainer would add these gradients up).
    """
    weights = config.state_shardings
    down = weights["w2_EDF"]
    whole = {axis: spmd.I if of == spmd.S(2) else of for axis, of in down.axis_types.items()}
    biases = {
        "b1_EF": weights["w1_EFD"],
        "b2_ED": replace(down, axis_types=whole),
        "b3_EF": weights["w1_EFD"],
    }
    return replace(config, state_shardings={**weights, **biases})


def added_once(b2_ED: Tensor, tensor_parallel_degree: int) -> Tensor:
    """Return what each rank of a tensor-parallel group adds, for a sum over them that has b2 once.

    No collective.
    """
    if tensor_parallel_degree == 1:
        return b2_ED
    # The host's type checker does not know the function; the part of a rank is the rank's own.
    with spmd.no_typecheck():
        part_ED = _Share.apply(b2_ED, tensor_parallel_degree)
    if spmd.is_type_checking():
        spmd.assert_type(part_ED, dict.fromkeys(("dp", "cp", "tp"), spmd.V))
    return part_ED


class _Share(Function):
    """The tensor divided by the number of ranks; its gradient is whole on each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: int) -> Tensor:
        return tensor / ranks

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
