"""The step from which a run will resume, checked before anything is started.

The trainer takes the newest folder that is named like a step and has metadata. It looks at nothing
else before it loads, on all ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import run_folder

if TYPE_CHECKING:
    from ezpz_moe.tools.trainer_settings import CheckpointSettings


def flags_to_resume(settings: CheckpointSettings, *, from_last_whole: bool) -> list[str]:
    """Return flags with which the trainer resumes from a whole step; none if it does so by itself.

    Args:
        from_last_whole: whether to pass over steps that are damaged or hold the model alone.

    Raises:
        EzpzError: what the trainer would load is damaged or missing; the message names the file,
            and the step that is whole. Or it is of a step behind the last one. Or
            ``from_last_whole``, and none is whole, or checkpoints are off.
    """
    if from_last_whole and not settings.is_enabled:
        raise EzpzError(
            "--resume-from-last-whole: checkpoints are off, so the run would begin at step 1. Add "
            "--checkpoint.enable."
        )
    found = run_folder.steps(settings.folder) if settings.is_enabled else {}
    # Also from_last_whole: a job script that always passes it has to start for the first time.
    if not found and settings.load_step is None:
        return []
    newest = max(found.values(), default=0)
    if from_last_whole and settings.load_step is None:
        whole = _newest_whole(settings.folder, found)
        if whole is None:
            raise EzpzError(
                f"{settings.folder}: no step in it is whole. Start a new run, in another "
                "--dump_folder."
            )
        if settings.loads_step and settings.last_step is not None:
            refuse_past_the_end(settings.folder / f"step-{whole}", whole, settings.last_step)
        # Without load_step: a run that needs none sets nothing aside, and may go on unattended.
        return [] if whole == newest else ["--checkpoint.load_step", str(whole)]
    step = newest if settings.load_step is None else settings.load_step
    if not settings.is_enabled:
        return []
    if problem := _damage(settings.folder, step, found):
        raise EzpzError(f"{problem} {_remedy(settings, found)}")
    if settings.loads_step and settings.last_step is not None:
        refuse_past_the_end(settings.folder / f"step-{step}", step, settings.last_step)
    return []


def refuse_past_the_end(checkpoint: Path, step: int, last: int) -> None:
    """Refuse to resume from a step behind the run's last one.

    Nothing would be trained, and the trainer's learning rate may have no value there. The last step
    itself is not refused: a job script that is started once more has nothing left to do.

    Raises:
        EzpzError: ``step``, that of ``checkpoint``, is greater than ``last``, the training.steps.
    """
    if step > last:
        raise EzpzError(
            f"{checkpoint}: is of step {step}, and training.steps is {last}, so nothing would be "
            f"trained. Set training.steps above {step}, resume from an earlier step with "
            "checkpoint.load_step, or begin a new run in another --dump_folder."
        )


def _newest_whole(folder: Path, found: dict[str, int]) -> int | None:
    """Return the newest step that a run can resume from."""
    # Without copies such as step-20.bak. The trainer counts them, but load_step can only name
    # step-20.
    steps = sorted((step for name, step in found.items() if name == f"step-{step}"), reverse=True)
    return next((step for step in steps if _can_be_resumed(folder / f"step-{step}")), None)


def _can_be_resumed(checkpoint: Path) -> bool:
    # Not imported at the top: a first start should not wait for torch here.
    from ezpz_moe.tools.checkpoints import storage
    from ezpz_moe.tools.checkpoints.contents import has_optimizer

    try:
        storage.check_metadata(checkpoint)
        metadata = storage.read_metadata(checkpoint)
    except EzpzError:
        return False
    # Step 0 is a seed: it never has more than the model, and the trainer knows.
    return has_optimizer(metadata) or checkpoint.name == "step-0"


def _damage(folder: Path, step: int, found: dict[str, int]) -> str | None:
    """Return what is wrong with what the trainer takes for ``step``."""
    from ezpz_moe.tools.checkpoints import storage

    checkpoint = folder / f"step-{step}"
    if not checkpoint.is_dir() and step in found.values():
        copy = next(name for name, each in found.items() if each == step)
        return f"{folder / copy}: the trainer takes it for {checkpoint.name}, which is not there."
    try:
        storage.check_metadata(checkpoint)
    except EzpzError as error:
        return str(error)
    return None


def _remedy(settings: CheckpointSettings, found: dict[str, int]) -> str:
    whole = _newest_whole(settings.folder, found)
    if settings.load_step is not None and not found:
        return (
            "There is no checkpoint at all: without checkpoint.load_step the run begins at step 1."
        )
    if whole is None:
        # A new folder has no steps either, so load_step must not stay.
        flag = "" if settings.load_step is None else ", without checkpoint.load_step and"
        return f"No other step is whole: start a new run{flag or ','} in another --dump_folder."
    if settings.load_step is not None:
        return f"Set checkpoint.load_step to {whole}, which is whole."
    return f"Add --resume-from-last-whole to resume from step-{whole}."
