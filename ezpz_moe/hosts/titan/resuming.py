"""Load what a checkpoint has for a run, and say before the first step what that changes."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components.checkpointer import DATALOADER, OPTIMIZER
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.metadata import read_metadata
from ezpz_moe.hosts.dcp.paths import METADATA, complete_steps
from ezpz_moe.hosts.resuming import Entries, Fit, fit

# The degree's key in a dataloader's state: in 0.3, and since August 2026.
_DEGREE = ("world_size", "dp_world_size")


def what_fits(states: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the checkpoint in ``folder`` has of ``states``, and log what it lacks.

    Collective: a stage of a pipeline may lack what the others have, and all have to stop together.

    Raises:
        EzpzError: the run cannot load the checkpoint, or its metadata is damaged.
    """
    wanted, saved = _entries(states), saved_entries(folder)
    found = fit(
        _of_all_ranks(wanted, saved),
        saved,
        where=str(folder),
        data_ranks=_data_ranks(states.get(DATALOADER)),
        whole_steps=lambda: list(whole_steps(folder.parent)),
    )
    for note in found.notes:
        logger.warning(f"ezpz_moe: {folder}: {note}.")
    return _part(states, found)


def saved_entries(folder: Path) -> Entries:
    """Return the entries of a checkpoint; those of safetensors are not looked at.

    Raises:
        EzpzError: its metadata is damaged, or names what no metadata needs: the host would run it.
    """
    if not (folder / METADATA).is_file():
        return {}
    return {
        name: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for name, entry in read_metadata(folder).state_dict_metadata.items()
    }


def whole_steps(folder: Path) -> Iterator[int]:
    """Yield the steps in ``folder`` whose checkpoints have all of a run's state."""
    for step, checkpoint in complete_steps(folder).items():
        if _is_whole(checkpoint):
            yield step


@contextmanager
def reporting_damage(folder: Path, steps: Path) -> Iterator[None]:
    """Turn DCP's failure to load the checkpoint in ``folder`` into one line.

    Files of the right length whose bytes are wrong, such as zeros after a power cut, show only now.
    ``steps`` has the checkpoints of the run; the one that it starts from may be elsewhere.

    Raises:
        EzpzError: it could not be loaded, by any rank.
    """
    try:
        yield
    except CheckpointException as error:
        others = [step for step in whole_steps(steps) if folder.name != f"step-{step}"]
        remedy = "Copy the checkpoint again"
        if others and folder.parent == steps:
            remedy += f", or resume from another step: --checkpoint.load_step {max(others)}"
        raise EzpzError(f"{folder}: cannot be loaded: {why_it_failed(error)}. {remedy}.") from error


def why_it_failed(error: BaseException) -> str:
    """Return the system's own reason, or the first line of what was raised instead."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    # torch raises an error about a position in the file, while it handles the system's.
    while cause and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    # Of such bytes torch says that they may be a program, and how to run it all the same.
    if isinstance(error, pickle.UnpicklingError):
        return "its bytes are not what torch saved"
    return str(error).partition("\n")[0].rstrip(".")


def _is_whole(checkpoint: Path) -> bool:
    try:
        return "train_state.step" in saved_entries(checkpoint)
    except EzpzError:
        return False


# --- what fits ------------------------------------------------------------------------------------


def _entries(states: Mapping[str, Any]) -> Entries:
    """Return the entries that torch.distributed.checkpoint will ask for, as it names them."""
    planner = DefaultLoadPlanner()
    planner.set_up_planner(
        {
            name: part.state_dict() if isinstance(part, Stateful) else part
            for name, part in states.items()
        }
    )
    return {
        name: tuple(value.shape) if isinstance(value, torch.Tensor) else None
        for name, value in planner.state_dict.items()
    }


def _of_all_ranks(wanted: Entries, saved: Entries) -> Entries:
    """Return what any rank wants. What is in the checkpoint is not sent around, only marked."""
    names = sorted(saved)
    marks_N = torch.tensor([name in wanted for name in names], dtype=torch.int32)
    marks_N = marks_N.to(utils.device_type)
    dist.all_reduce(marks_N, op=dist.ReduceOp.MAX)
    elsewhere = {
        name: saved[name] for name, mark in zip(names, marks_N.tolist(), strict=True) if mark
    }
    odd = {name: shape for name, shape in wanted.items() if saved.get(name, "none") != shape}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, odd)
    for each in of_ranks:
        elsewhere |= each
    return elsewhere


def _data_ranks(dataloader: Any) -> int | None:
    state = dataloader.state_dict() if dataloader is not None else {}
    return next((state[key] for key in _DEGREE if key in state), None)


def _part(states: Mapping[str, Any], found: Fit) -> dict[str, Any]:
    """Return ``states`` without what the checkpoint lacks."""
    part = {name: value for name, value in states.items() if name not in found.afresh}
    if any(name.startswith(f"{OPTIMIZER}.") for name in found.afresh):
        part[OPTIMIZER] = _Part(states[OPTIMIZER], f"{OPTIMIZER}.", found.afresh)
    return part


class _Part(Stateful):
    """A part of another object's state; what is not loaded keeps its value."""

    def __init__(self, whole: Stateful, prefix: str, without: frozenset[str]) -> None:
        self._whole = whole
        self._without = {name.removeprefix(prefix) for name in without}

    def state_dict(self) -> dict[str, Any]:
        state = self._whole.state_dict()
        return {name: value for name, value in state.items() if name not in self._without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self._whole.state_dict()
        for name in self._without & own.keys():  # other stages of a pipeline lack other names
            # To make its state, the host takes a step, which does not count.
            if name.endswith(".step"):
                own[name] = torch.zeros_like(own[name])
        self._whole.load_state_dict(own | state)
