"""Dump what each token's routers did in some steps, for a flavor's ``[telemetry] dump``.

Legend: L = MoE layers of this rank, T = its tokens of a step, E = experts, K = top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from ezpz_moe.config.telemetry_schema import Dump
from ezpz_moe.routing import keeping
from ezpz_moe.telemetry.dump import FOLDER, Dumps

_BYTES = {"ids": 2, "probabilities": 4}
_ABSENT = {"ids": -1, "probabilities": 0.0}
"""What stands for a choice that a layer's tokens do not make, or for an expert that it has not."""


class RoutingDump:
    """Writes the routing of step 1 and of every ``dump.every``-th step of a run."""

    def __init__(self, dump: Dump, dump_folder: Path) -> None:
        self._dump = dump
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._dumps = Dumps(dump_folder / FOLDER, rank, ranks)
        self._has_begun = False
        self._is_on = True

    def begin(self, step: int, routers: Sequence[Any], *, says: bool) -> None:
        """Keep the routing of ``step`` if it is due. All ranks call this before each step.

        Args:
            step: the one that is about to begin.
            routers: this rank's.
            says: whether this rank logs how much will be written.
        """
        if not self._has_begun:
            self._has_begun = True
            self._say(routers, says=says)
            self._set_aside(step)
        if self._is_on and self._is_due(step):
            for router in routers:
                router.kept_2[1] = 0
            keeping.begin(self._dump.what)

    def end(self, step: int) -> None:
        """Write the file of ``step`` if it is due. A rank without MoE layers writes none."""
        if self._is_on and self._is_due(step) and (of_layers := keeping.end()):
            self._dumps.write(step, _arrays(of_layers))

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self._dump.every == 0

    def _set_aside(self, step: int) -> None:
        folder = self._dumps.folder
        try:
            moved = self._dumps.set_aside(step)
        except OSError as error:
            # Going on would overwrite them, or mix two attempts.
            self._is_on = False
            logger.warning(
                f"ezpz_moe: {folder}: the dumps of step {step} and later, of an attempt that was "
                f"abandoned, cannot be moved: {error.strerror or error}. The run goes on, and this "
                f"rank dumps nothing."
            )
        else:
            if moved:
                logger.warning(
                    f"ezpz_moe: {folder}: the dumps of step {step} and later are of an attempt "
                    f"that was abandoned, and now in {moved[0].parent}: {len(moved)} of this rank."
                )

    def _say(self, routers: Sequence[Any], *, says: bool) -> None:
        """Log the size of a dump, of all ranks."""
        shapes = self._shapes(routers)
        size = sum(prod(shape) * _BYTES[name] for name, shape in shapes.items())
        size_1 = torch.tensor([size], dtype=torch.int64, device=utils.device_type)
        torch.distributed.all_reduce(size_1)
        if says:
            files = torch.distributed.get_world_size()
            of_this = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            logger.info(
                f"ezpz_moe: [telemetry] dump: {size_1.item() / 1e6:,.3g} MB to "
                f"{self._dumps.folder} in step 1 and every {self._dump.every} steps, in "
                f"{files} file{'s' * (files > 1)}; this rank's has {of_this}"
            )

    def _shapes(self, routers: Sequence[Any]) -> dict[str, tuple[int, ...]]:
        if not routers:
            return {}
        L, T = len(routers), routers[0].tokens_of_step
        K = max(router.top_k for router in routers)
        E = max(router.num_experts for router in routers)
        shapes = {"ids": (L, T, K), "probabilities": (L, T, E)}
        return {name: shapes[name] for name in self._dump.what}


def _arrays(of_layers: Mapping[int, Sequence[keeping.Microbatch]]) -> dict[str, Any]:
    """Return what a file has: ``layers`` [L], ``mask`` [T], ``ids`` [L, T, K], ..."""
    layers = sorted(of_layers)
    wholes = [_whole(of_layers[layer]) for layer in layers]
    # Every layer has the same tokens.
    arrays = {"layers": np.array(layers), "mask": wholes[0].pop("mask")}
    names = wholes[0].keys()
    return arrays | {name: _stacked([whole[name] for whole in wholes], name) for name in names}


def _stacked(layers: Sequence[Any], name: str) -> Any:
    """Return [L, T, ...] as wide as the widest layer; what a layer does not have is filled."""
    width = max(each.shape[1] for each in layers)
    fill = _ABSENT[name]
    return np.stack(
        [
            np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=fill)
            for each in layers
        ]
    )


def _whole(microbatches: Sequence[keeping.Microbatch]) -> dict[str, Any]:
    names = microbatches[0].keys()
    return {name: torch.cat([each[name] for each in microbatches]).numpy() for name in names}
