"""Decide whether a run can load a checkpoint, and say what it will begin afresh or leave out.

Pure: names and shapes in, words out. Both sides are *entries*, as torch.distributed.checkpoint
names them: a tensor's shape by its name, or None for what is not a tensor. They are those of all
ranks together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ezpz_moe.errors import EzpzError

Entries = Mapping[str, tuple[int, ...] | None]

_STEP = "train_state.step"
_DATA = "dataloader"
_TRAINING_STATE = ("optimizer", "lr_scheduler", _DATA, "train_state")
_OPTIMIZER_STATE = re.compile(r"optimizer\.state\.(?P<parameter>.+)\.[^.]+")
_OPTIMIZER_GROUP = re.compile(r"optimizer\.param_groups\.(?P<parameter>.+)\.[^.]+")
_POSITION = re.compile(r"dataloader\.dp_rank_(\d+)(\..*)?")


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a run.

    Attributes:
        afresh: the entries that it lacks, and that keep the values the run begins with.
        notes: what the user has to know about it before the first step.
    """

    afresh: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


def fit(
    wanted: Entries,
    saved: Entries,
    *,
    where: str,
    data_ranks: int | None,
    whole_steps: Callable[[], Collection[int]],
) -> Fit:
    """Compare what a run loads with what a checkpoint holds.

    A selection bias may be absent on either side, and so may the state of an optimizer for some
    parameters: this is what a flavor changes with ``bias_update`` and ``freeze``.

    Args:
        wanted: what the run loads. Without ``train_state`` it loads weights, and does not resume.
        saved: what the checkpoint holds; nothing if it holds safetensors.
        where: the checkpoint's folder, for messages.
        data_ranks: the run's data-parallel degree; None if it does not load the data's position.
        whole_steps: finds the steps from which a run can resume, for the message.

    Raises:
        EzpzError: the run cannot load the checkpoint, or would lose what no setting explains.
    """
    resumes = _STEP in wanted
    if resumes and _STEP not in saved:
        raise EzpzError(_model_alone(where, whole_steps(), is_dcp=bool(saved)))
    _refuse_other_model(wanted, saved, where, resumes)
    if data_ranks is not None:
        _refuse_other_degree(saved, where, data_ranks)
    # Of one model: what is still missing belongs to the training state.
    afresh = _missing_biases(wanted, saved) | _missing_optimizer_state(wanted, saved)
    if left := sorted(wanted.keys() - saved.keys() - afresh):
        raise EzpzError(f"{where}: lacks {some(left)}, which this run needs. {_leave_out(left)}")
    return Fit(frozenset(afresh), tuple(_notes(wanted, saved, resumes)))


def rates_differ(step: int, *, saved: float, ours: float) -> str:
    """Return both learning rates of ``step`` in words; empty if they are the same.

    Args:
        step: the first one of the resumed run.
        saved: what the run that saved the checkpoint would have taken for it.
        ours: what this run's schedule has for it.
    """
    if math.isclose(saved, ours, rel_tol=1e-6):
        return ""
    return (
        f"the learning rate of step {step} is {saved:.6g} in the run that saved the checkpoint and "
        f"{ours:.6g} in this job's schedule, which holds from step {step + 1} on: training.steps, "
        "[lr_scheduler] or optimizer.lr has changed. To keep the schedule of a longer run, set "
        "lr_scheduler.total_steps to its number of steps"
    )


def some(names: Iterable[str]) -> str:
    """Name the first of ``names``, and count the others."""
    first, *others = names
    return f"{first} and {len(others)} more" if others else first


# --- what is refused ------------------------------------------------------------------------------


def _model_alone(where: str, whole_steps: Collection[int], *, is_dcp: bool) -> str:
    weights = (
        "To start a new run from its weights, use --checkpoint.initial_load_path with its "
        f"absolute path{'' if is_dcp else ', --checkpoint.initial_load_in_hf'}, and a new "
        "--dump_folder."
    )
    if not whole_steps:
        return f"{where}: holds the model alone, so no run can resume from it. {weights}"
    step = max(whole_steps)
    return (
        f"{where}: holds the model alone, so no run can resume from it. The newest whole "
        f"checkpoint is step-{step}: resume with --checkpoint.load_step {step}. {weights}"
    )


def _refuse_other_model(wanted: Entries, saved: Entries, where: str, resumes: bool) -> None:
    differences = [
        f"{name} is {list(saved[name] or ())} there and {list(shape or ())} here"
        for name, shape in wanted.items()
        if name in saved and None not in (shape, saved[name]) and shape != saved[name]
    ]
    ours, theirs = _of_model(wanted), _of_model(saved)
    differences += [
        f"{name} is missing" for name in sorted(ours - theirs) if not is_selection_bias(name)
    ]
    if resumes:  # starting from the weights of a larger model is a choice, resuming is not
        others = sorted(theirs - ours)
        differences += [f"{name} is only there" for name in others if not is_selection_bias(name)]
    if differences:
        shown, more = "; ".join(differences[:2]), len(differences) - 2
        raise EzpzError(
            f"{where}: is of another model: {shown}{f'; {more} more' if more > 0 else ''}. Use the "
            "flavor that it was saved with, or a new --dump_folder."
        )


def _refuse_other_degree(saved: Entries, where: str, data_ranks: int) -> None:
    ranks = {match[1] for name in saved if (match := _POSITION.fullmatch(name))}
    if ranks and len(ranks) != data_ranks:
        raise EzpzError(
            f"{where}: holds the position in the data of {len(ranks)} data-parallel rank(s), and "
            f"this run has {data_ranks}. To start the data over, add "
            f"--checkpoint.exclude_from_loading {_DATA}; to go on where it was, resume with "
            f"{len(ranks)}."
        )


def _leave_out(names: Iterable[str]) -> str:
    sections = sorted({name.partition(".")[0] for name in names})
    return f"To do without, resume with --checkpoint.exclude_from_loading {' '.join(sections)}."


# --- what may differ ------------------------------------------------------------------------------


def _notes(wanted: Entries, saved: Entries, resumes: bool) -> Iterator[str]:
    if missing := sorted(_missing_biases(wanted, saved)):
        yield f"the checkpoint has no {some(missing)}: a selection bias begins at zero"
    if dropped := sorted(filter(is_selection_bias, _of_model(saved) - _of_model(wanted))):
        yield f"the checkpoint's {some(dropped)} is left out: this run has no selection bias"
    if not resumes:
        return
    ours, theirs = _with_state(wanted), _with_state(saved)
    if fresh := sorted(ours - theirs):
        yield f"the checkpoint has no optimizer state of {some(fresh)}, which begins afresh"
    # Without any of its own, the run does not load the optimizer: it was told to leave it out.
    if ours and (frozen := sorted(theirs - ours)):
        yield f"the optimizer's state of {some(frozen)} is left out: it is not trained any more"


def _missing_biases(wanted: Entries, saved: Entries) -> set[str]:
    return {name for name in wanted.keys() - saved.keys() if is_selection_bias(name)}


def _missing_optimizer_state(wanted: Entries, saved: Entries) -> set[str]:
    """Return the entries of parameters of which the checkpoint has no state, unless it has none."""
    known = _with_state(saved)
    # No setting of ours takes the state of all parameters away, so something else is wrong.
    if not known:
        return set()
    return {
        name
        for name in wanted.keys() - saved.keys()
        for pattern in (_OPTIMIZER_STATE, _OPTIMIZER_GROUP)
        if (match := pattern.fullmatch(name)) and match["parameter"] not in known
    }


def _with_state(entries: Entries) -> set[str]:
    """Return the parameters that have state in an optimizer."""
    found = map(_OPTIMIZER_STATE.fullmatch, entries)
    return {match["parameter"] for match in found if match}


def _of_model(entries: Entries) -> set[str]:
    return {name for name in entries if name.partition(".")[0] not in _TRAINING_STATE}


def is_selection_bias(name: str) -> bool:
    """Whether it is a selection bias, which a model has or not by ``bias_update``."""
    return name.endswith((".moe.expert_bias_E", ".moe.expert_bias"))
