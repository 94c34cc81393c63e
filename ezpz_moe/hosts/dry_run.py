"""A rank's model, taken out of the host's trainer when its parallelisms have been applied.

The host's fake communication makes one process believe that it is a rank among many, and its model
stays on the meta device until it has been parallelized. The two functions that parallelize, of
0.3's ``ModelSpec`` as of 0.2's ``TrainSpec``, are the door: they are called inside the trainer,
after meshes and model are built, and here they end the run when they return. Nothing of the trainer
is repeated, so that a mistake shows as the error that the rank would have met.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from ezpz_moe.hosts.local import local
from ezpz_moe.hosts.rank_report import RankReport

STATES_PER_PARAMETER = 4
"""Weight, gradient and AdamW's two moments, all in the weight's dtype."""

FAKE_COMMUNICATION = ("--comm.mode", "fake_backend")


def become_rank(rank: int, world_size: int) -> None:
    """Set what the host reads of a launcher."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(world_size), "NGPU": str(world_size)}


def parallelized(build: Callable[[], Any], spec: Any, *, has_pipeline: bool) -> list[nn.Module]:
    """The model's parts on this rank, on the meta device.

    Args:
        build: makes the host's trainer; may raise whatever the rank would have met.
        spec: the host's record with ``parallelize_fn`` and ``pipelining_fn``; it is changed.
        has_pipeline: which of the two the trainer will call.
    """
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
    """What the rank holds in its parts of the model."""
    parameters = [local(p) for part in parts for p in part.parameters()]
    return RankReport(
        rank=rank,
        parameters=sum(p.numel() for p in parameters),
        state_bytes=STATES_PER_PARAMETER * sum(p.numel() * p.itemsize for p in parameters),
        step=step,
    )


class _Parallelized(BaseException):
    """Ends the trainer's construction. No Exception, so that nothing on the way handles it."""

    def __init__(self, parts: list[nn.Module]) -> None:
        self.parts = parts


def _ending_with(
    parts_of: Callable[[Any], list[nn.Module]], parallelize: Callable[..., Any] | None
) -> Callable[..., Any]:
    assert parallelize is not None

    def parallelize_and_end(*args: Any, **kwargs: Any) -> None:
        raise _Parallelized(parts_of(parallelize(*args, **kwargs)))

    return parallelize_and_end
