"""The device that this machine would train on, and whether a rank's model states fit on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ezpz_moe.hosts.cpu import device_memory, device_module
from ezpz_moe.hosts.dry_run import STATES_PER_PARAMETER
from ezpz_moe.hosts.parts import TrainerConfig
from ezpz_moe.hosts.ranks import share_of_model
from ezpz_moe.tools.verify import default_device


def in_words() -> str:
    """Return the device's kind, name and memory."""
    kind = default_device()
    return f"{kind}: {device_module(kind).get_device_name()}, {memory() / 2**30:.1f} GiB"


def memory() -> int:
    """Return the device's memory in bytes; of a CPU, the machine's."""
    return device_memory(default_device())


@dataclass(frozen=True)
class ModelStates:
    """What an average rank holds without activations, in bytes, beside what there is.

    Attributes:
        held: weights, gradients and AdamW's two moments of one rank.
        ranks: of the run.
        sharing: ranks that share a device's memory: on a CPU all those of a machine.
        there: the device's memory.
        is_offloaded: whether the states are in the host's memory instead.
    """

    held: int
    ranks: int
    sharing: int
    there: int
    is_offloaded: bool

    @property
    def fit(self) -> bool:
        """Whether the device can hold them."""
        return self.is_offloaded or self.held * self.sharing <= self.there

    @property
    def needed(self) -> str:
        """What each rank holds, in words."""
        return (
            f"{self.held / 2**30:.1f} GiB of model states on each of {self.ranks} rank(s), without "
            "activations"
        )

    @property
    def room(self) -> str:
        """Where they go, in words."""
        if self.is_offloaded:
            return "kept in the host's memory, not the device's"
        shared = f", shared by {self.sharing} ranks" if self.sharing > 1 else ""
        return f"{self.there / 2**30:.1f} GiB of device memory{shared}"


def model_states(
    config: TrainerConfig, parameters: int, ranks: int, nproc: int | None
) -> ModelStates:
    """Estimate what an average rank of a run holds.

    An average: shards differ by rounding, and pipeline stages by their layers. `ezpz-moe describe`
    counts each stage.

    Args:
        config: the trainer's.
        parameters: of the whole model.
        ranks: of the run.
        nproc: how many of them run on one machine; None if not known.
    """
    size = getattr(torch, config.training.dtype).itemsize
    share = share_of_model(config.parallelism, ranks)
    return ModelStates(
        held=int(STATES_PER_PARAMETER * size * parameters * share),
        ranks=ranks,
        sharing=(nproc or 1) if default_device() == "cpu" else 1,
        there=memory(),
        is_offloaded=config.training.enable_cpu_offload,
    )
