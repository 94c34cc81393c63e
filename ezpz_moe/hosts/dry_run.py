"""Take a rank's model out of the host's trainer once its parallelisms have been applied.

The host's fake communication makes one process believe that it is one rank of many, and its model
stays on the meta device until it has been parallelized. The two functions that parallelize it are
fields of ``ModelSpec`` (0.3) and ``TrainSpec`` (0.2). The trainer calls them after it has built
meshes and model. Here they are wrapped to end the run when they return. No part of the trainer is
reimplemented, so a mistake raises the same error that the rank would have raised.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.rank_report import RankReport

STATES_PER_PARAMETER = 4
"""Of one that learns: weight, gradient and AdamW's two moments, all in the weight's dtype."""

FAKE_COMMUNICATION = ("--comm.mode", "fake_backend")


def become_rank(rank: int, world_size: int) -> None:
    """Set the environment variables that the host reads from a launcher."""
    # LOCAL_RANK 0 for every rank: this machine may have one device, or none. NGPU is the world size
    # of the host's fake communication, which ignores WORLD_SIZE.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world_size), "NGPU": str(world_size)}


def parallelized(build: Callable[[], Any], spec: Any, *, has_pipeline: bool) -> list[nn.Module]:
    """Build the trainer and return this rank's parts of the model, on the meta device.

    Args:
        build: makes the host's trainer; it may raise whatever the rank would have raised.
        spec: the host's record with ``parallelize_fn`` and ``pipelining_fn``; changed in place.
        has_pipeline: which of the two the trainer will call.
    """
    # The host's pipelining_fn returns the schedule first, then the model parts of this rank.
    if has_pipeline:
        spec.pipelining_fn = _ending_with(lambda stages: stages[1], spec.pipelining_fn)
    else:
        spec.parallelize_fn = _ending_with(lambda model: [model], spec.parallelize_fn)
    try:
        build()
    except _Parallelized as end:
        return end.parts
    raise AssertionError("the trainer was built without parallelizing its model")


def report(rank: int, parts: list[nn.Module], step: str | None = None) -> RankReport:
    """Report what the rank holds in its parts of the model."""
    parameters = [(local(p), p.requires_grad) for part in parts for p in part.parameters()]
    return RankReport(
        rank=rank,
        parameters=sum(p.numel() for p, _ in parameters),
        # Of a frozen one there is the weight alone.
        state_bytes=sum(
            p.numel() * p.itemsize * (STATES_PER_PARAMETER if learns else 1)
            for p, learns in parameters
        ),
        step=step,
    )


class _Parallelized(BaseException):
    """End the construction of the trainer. No ``except Exception`` on the way catches it."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts


def _ending_with(
    parts_of: Callable[[Any], list[nn.Module]], parallelize: Callable[..., Any] | None
) -> Callable[..., Any]:
    assert parallelize is not None

    def parallelize_and_end(*args: Any, **kwargs: Any) -> None:
        raise _Parallelized(parts_of(parallelize(*args, **kwargs)))

    return parallelize_and_end
