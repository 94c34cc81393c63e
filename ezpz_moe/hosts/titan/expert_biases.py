"""Biases of routed experts, under the trainer's parallelisms.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from dataclasses import replace

import spmd_types as spmd
from torch import Tensor
from torchtitan.protocols.sharding import ShardingConfig

from ezpz_moe.hosts.titan.base import titan


def with_biases(config: ShardingConfig) -> ShardingConfig:
    """Return how the experts' weights are sharded, with their biases.

    A bias is sharded as the output of its product: b1 and b3 over F as w1 is. b2 has no F, so that
    every rank of a tensor-parallel group has all of it.
    """
    weights = config.state_shardings
    down = weights["w2_EDF"]
    whole = {axis: spmd.R if of == spmd.S(2) else of for axis, of in down.axis_types.items()}
    biases = {
        "b1_EF": weights["w1_EFD"],
        "b2_ED": replace(down, axis_types=whole),
        "b3_EF": weights["w1_EFD"],
    }
    return replace(config, state_shardings={**weights, **biases})


def added_once(b2_ED: Tensor, tensor_parallel_degree: int) -> Tensor:
    """Return what each rank of a tensor-parallel group adds, for a sum over them that has b2 once.

    Every rank holds all of b2, and its gradient is the whole one on each. No collective.
    """
    if tensor_parallel_degree == 1:
        return b2_ED
    with titan().importing():  # only such a run needs this from the host
        from torchtitan.models.gpt_oss.moe import ScaleBiasForward
    return ScaleBiasForward.apply(b2_ED, tensor_parallel_degree, b2_ED.dtype)
