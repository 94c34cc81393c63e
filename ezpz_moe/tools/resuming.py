"""Tell, before a run, what a job would resume from, and with which learning rate."""

from __future__ import annotations

from collections.abc import Sequence
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
from ezpz_moe.tools.resume_point import flags_to_resume, refuse_past_the_end
from ezpz_moe.tools.trainer_settings import CheckpointSettings, checkpoint_settings

_STEP = "train_state.step"
# The host saves the optimizer's settings for each parameter: optimizer.param_groups.NAME.lr.
_RATE = "optimizer.param_groups."
_SEED = "step-0"  # of it the trainer loads the model alone, whatever it holds


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


def resumption(
    job: Job,
    config: TrainerConfig,
    host_flags: Sequence[str] = (),
    *,
    from_last_whole: bool = False,
) -> Resumption | None:
    """Return where the job's run would resume; None if it would begin at step 1.

    Args:
        job: what is trained.
        config: the trainer's, from the job and the flags.
        host_flags: the trainer's own flags, which override the job.
        from_last_whole: whether to resume from an earlier step if the newest is damaged.

    Raises:
        EzpzError: the checkpoint cannot be read, the job names a step that is not there, or the
            checkpoint's step is behind the job's last one.
    """
    settings = checkpoint_settings(job, list(host_flags))
    checkpoint = _loaded_with(settings, from_last_whole=from_last_whole)
    if checkpoint is None:
        return None
    metadata = storage.read_metadata(checkpoint)
    if checkpoint.name == _SEED:
        return Resumption(checkpoint, 1)
    if _STEP not in metadata.state_dict_metadata:
        return Resumption(checkpoint)
    if not settings.loads_step:
        return Resumption(checkpoint, 1)
    steps = int(_load(checkpoint, metadata, _STEP))
    refuse_past_the_end(checkpoint, steps, config.training.steps)
    saved = next((name for name in metadata.state_dict_metadata if _is_rate(name)), None)
    left_out = {"optimizer", "lr_scheduler"} & set(config.checkpoint.exclude_from_loading)
    if saved is None or left_out:
        return Resumption(checkpoint, steps + 1)
    rates = rates_differ(
        steps + 1,
        saved=float(_load(checkpoint, metadata, saved)),
        # The schedule counts from 0: step 1 has its value at 0, the resumed one that at `steps`.
        ours=detect.host().learning_rate(config, steps),
    )
    return Resumption(checkpoint, steps + 1, rates)


def _loaded_with(settings: CheckpointSettings, *, from_last_whole: bool) -> Path | None:
    """Return the checkpoint that a run loads; None without one, or if it loads none.

    Raises:
        EzpzError: the settings name a step that is not there; or ``from_last_whole``, and none is
            whole.
    """
    folder, step = settings.folder, settings.load_step
    if from_last_whole and (flags := flags_to_resume(settings, from_last_whole=True)):
        step = int(flags[-1])
    if not settings.is_enabled:
        return None
    if step is not None:
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
