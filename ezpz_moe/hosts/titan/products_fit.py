"""Decide whether selective checkpointing keeps the experts' products: whether they fit.

Decided where the model is parallelized, while it is whole and without memory. What else forward
leaves for backward is not known there. So the products get at most half of what weights, gradients
and optimizer states leave of the device's memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from ezpz_moe.compute import get_backend
from ezpz_moe.hosts.accounting import ffn_matrices
from ezpz_moe.hosts.cpu import device_memory
from ezpz_moe.hosts.dry_run import STATES_PER_PARAMETER
from ezpz_moe.hosts.ranks import share_of_model
from ezpz_moe.hosts.titan.selector import Selector
from ezpz_moe.telemetry.text import memory


def saved_or_not(
    model: nn.Module, training: Any, parallelism: Any, capacity: int | None = None
) -> Literal["save", "recompute"]:
    """Return what the experts' products of every layer are to be, on all ranks alike; log it.

    All ranks have to meet here. One collective, of one number.

    Args:
        model: the rank's layers, before anything is sharded.
        training, parallelism: these sections of the run's config.
        capacity: bytes of the rank's memory; None: of its device.
    """
    # What is described is another machine than this one; and a host may count batches otherwise.
    if _is_described() or not hasattr(training, "local_batch_size"):
        return "save"
    left = (_capacity() if capacity is None else capacity) - _states(model, parallelism)
    # All microbatches, though a pipeline may hold fewer of them at a time.
    tokens = training.local_batch_size * training.seq_len // parallelism.context_parallel_degree
    needed = tokens * sum(bytes_per_token(model, parallelism.expert_parallel_degree))
    fits = _on_all_ranks(needed <= left / 2)
    remedy = "" if fits else '; to keep it all the same: [activation_checkpoint] experts = "save"'
    logger.info(
        f"ezpz_moe: selective checkpointing {'keeps' if fits else 'computes again'} what the "
        f"experts multiplied: {memory(needed)} of the {memory(max(left, 0))} that weights, "
        f"gradients and optimizer states leave{remedy}"
    )
    return "save" if fits else "recompute"


def bytes_per_token(model: nn.Module, expert_ranks: int = 1) -> Iterator[int]:
    """Yield for each MoE layer the bytes that its experts' operators return for one token.

    Gate, if any, and up, unless backward computes them again, and what the experts return: composed
    a row for each choice; as one node the layer's output, and the order of the rows.

    Args:
        model: the rank's layers.
        expert_ranks: the degree of expert parallelism. One node then returns a row to each rank
            that has sent the token: as many as the token's experts may be on, at most.
    """
    for moe in model.modules():
        if not hasattr(moe, "router"):
            continue
        # None: experts for which nobody has chosen a backend.
        experts = next((each for each in moe.modules() if isinstance(each, Selector)), None)
        if experts is None:
            continue
        k, dim = moe.router.top_k, _width(moe)
        rows, order = (min(k, expert_ranks), k * _ID) if experts.is_one_node else (k, 0)
        yield (
            int(k * _gate_and_up(experts, dim) + rows * dim) * experts.computed_in.itemsize + order
        )


_ID = torch.int64.itemsize


def _width(moe: Any) -> int:
    """Return D of the experts; in a latent, its width."""
    descend = getattr(moe.routed_experts, "descend", None)
    return descend.out_features if descend else moe.router.gate.in_features


def _gate_and_up(experts: Any, dim: int) -> float:
    """Return how many elements of them are kept for each row."""
    # An option of the backends that are made of kernels.
    if getattr(get_backend(experts.compute_backend), "recompute", False):
        return 0
    # Matrices [D, F] for each expert, whatever a host calls or stacks them; biases are small beside
    # them.
    matrices = ffn_matrices(experts.activation)
    held = sum(each[0].numel() for each in experts.parameters())
    return (matrices - 1) * held / (matrices * dim)


def _states(model: nn.Module, parallelism: Any) -> int:
    held = sum(each.numel() * each.itemsize for each in model.parameters())
    # A stage's model is its own share already.
    share = share_of_model(parallelism, dist.get_world_size()) if dist.is_initialized() else 1.0
    return int(STATES_PER_PARAMETER * held * share * parallelism.pipeline_parallel_degree)


def _capacity() -> int:
    """Return the bytes of the device's memory; on a CPU the rank's share of the machine's."""
    kind = utils.device_type
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if kind == "cpu" else 1
    return device_memory(kind) // ranks_here


def _is_described() -> bool:
    return dist.is_initialized() and dist.get_backend() == "fake"


def _on_all_ranks(fits: bool) -> bool:
    # A rank that recomputes repeats collectives that the others would not wait in.
    if not dist.is_initialized():
        return fits
    agreed = torch.tensor(int(fits), device=utils.device_type)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)
