"""Tell, before a run, what a job would resume from, and with which learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.config.job import Job
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import detect
from ezpz_moe.hosts.dcp.paths import find_checkpoint
from ezpz_moe.hosts.parts import TrainerConfig
from ezpz_moe.hosts.resuming import rates_differ
from ezpz_moe.tools.checkpoints import storage

_STEP = "train_state.step"
# The host saves the optimizer's settings for each parameter: optimizer.param_groups.NAME.lr.
_RATE = "optimizer.param_groups."
_SEED = "step-0"  # of it the trainer loads the model alone, whatever it holds
_LEFT_OUT = "checkpoint.exclude_from_loading"


@dataclass(frozen=True)
class Resumption:
    """Where a job's run would resume.

    Attributes:
        checkpoint: the folder.
        step: the first step of the resumed run; None if the checkpoint holds the model alone.
        rates: both learning rates of that step, in words; empty if they are the same.
    """

    checkpoint: Path
    step: int | None = None
    rates: str = ""


def resumption(job: Job, config: TrainerConfig) -> Resumption | None:
    """Return where the job's run would resume; None if it would begin at step 1.

    Args:
        config: the trainer's, from the job.

    Raises:
        EzpzError: the checkpoint cannot be read, or the job names a step that is not there.
    """
    checkpoint = _loaded_by(job)
    if checkpoint is None:
        return None
    metadata = storage.read_metadata(checkpoint)
    if checkpoint.name == _SEED:
        return Resumption(checkpoint, 1)
    if _STEP not in metadata.state_dict_metadata:
        return Resumption(checkpoint)
    steps = int(_load(checkpoint, metadata, _STEP))
    saved = next((name for name in metadata.state_dict_metadata if _is_rate(name)), None)
    left_out = {"optimizer", "lr_scheduler"} & set(job.values.get(_LEFT_OUT, ()))
    if saved is None or left_out:
        return Resumption(checkpoint, steps + 1)
    rates = rates_differ(
        steps + 1,
        saved=float(_load(checkpoint, metadata, saved)),
        # The schedule counts from 0: step 1 has its value at 0, the resumed one that at `steps`.
        ours=detect.host().learning_rate(config, steps),
    )
    return Resumption(checkpoint, steps + 1, rates)


def _loaded_by(job: Job) -> Path | None:
    """Return the checkpoint that the job loads; None without one, or if it loads none.

    Raises:
        EzpzError: the job names a step that is not there.
    """
    values = job.values
    if not values.get("checkpoint.enable", False):
        return None
    folder = Path(
        values.get("job.dump_folder", "./outputs"), values.get("checkpoint.folder", "checkpoint")
    )
    if (step := values.get("checkpoint.load_step", -1)) != -1:
        return find_checkpoint(folder / f"step-{step}")
    if not folder.is_dir():
        return None
    try:
        return find_checkpoint(folder)
    except EzpzError:  # a folder without checkpoints
        return None


def _is_rate(name: str) -> bool:
    return name.startswith(_RATE) and name.endswith(".lr")


def _load(checkpoint: Path, metadata: Metadata, name: str) -> Any:
    for index, entry in metadata.storage_data.items():
        if index.fqn == name:
            return storage.load(checkpoint, entry)
    raise EzpzError(f"{checkpoint}: its metadata lists {name}, and says of no file that has it.")
