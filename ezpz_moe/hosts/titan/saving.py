"""Save what keeps its meaning, and say in one line why a checkpoint could not be written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.tools import filesystem

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp import expert_order
from ezpz_moe.hosts.dcp.paths import METADATA
from ezpz_moe.hosts.resuming import is_selection_bias
from ezpz_moe.hosts.titan.resuming import whole_steps, why_it_failed


def with_exact_biases(states: Mapping[str, Any], of_model: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``states`` with the selection biases as the model has them, in float32.

    ``export_dtype`` casts everything. But a bias moves in steps of 0.001, and from 0.25 on bfloat16
    has none that small: rounded biases choose other experts.
    """
    exact = {name: bias_E for name, bias_E in of_model.items() if is_selection_bias(name)}
    return {name: exact.get(name, value) for name, value in states.items()}


def write_expert_order(checkpoint_id: str, said: bytes | None) -> None:
    """Leave beside a checkpoint what the loaded one said of its experts' first numbers.

    Before the checkpoint has its metadata: none that looks complete may lack the way back. Not in
    remote folders, where nothing of ours reads it.
    """
    if said is not None and not filesystem.is_remote(checkpoint_id) and dist.get_rank() == 0:
        expert_order.write(Path(checkpoint_id), said)


@contextmanager
def reporting_failure(folder: Path, step: int) -> Iterator[None]:
    """Turn a failure to write the checkpoint of ``step`` into one line, and remove its remains.

    ``folder`` has the checkpoints of all steps. Every rank learns of a failure of any.

    Raises:
        EzpzError: the checkpoint could not be written.
    """
    try:
        yield
    except (CheckpointException, OSError) as error:
        if not folder.is_dir():  # a remote one, or one that could not be made
            raise EzpzError(
                f"{folder}: checkpoints cannot be written here: {why_it_failed(error)}."
            ) from error
        written = folder / f"step-{step}"
        # Without metadata the host ignores it, but still counts it among those that it keeps.
        if dist.get_rank() == 0 and not (written / METADATA).exists():
            shutil.rmtree(written, ignore_errors=True)
        raise EzpzError(
            f"{written}: the checkpoint could not be written: {why_it_failed(error)}. "
            f"{_rest(folder)}"
        ) from error


def _rest(folder: Path) -> str:
    """Say how much room there is, and from which step the run can go on."""
    free = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free there"
    steps = sorted(whole_steps(folder))
    if not steps:
        return f"{free}, and no other checkpoint is. Make room, and start again."
    return (
        f"{free}. The newest whole checkpoint is step-{steps[-1]}: make room, and run the same "
        "command again to resume from it."
    )
