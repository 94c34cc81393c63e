"""What differs between the generations' checkpoints of a training run, besides names.

A generation ignores what it does not know, and fails without what it needs. So what the other one
wrote stays, and what the target needs is added:

===================  =========================================  ==================================
entry                torchtitan 0.2                             from 0.3 on
===================  =========================================  ==================================
``dataloader``       tokens of the last document read that are  the same as pairs of a token and
                     not trained on yet, ``token_buffer``       its label, with positions
``lr_scheduler``     everything of torch's LambdaLR             ``last_epoch``
===================  =========================================  ==================================

After 0.3 (since August 2026) the dataloader shuffles, and its position has no counterpart.
"""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp.unpickling import Refused, load_plain
from ezpz_moe.tools.checkpoints import storage
from ezpz_moe.tools.checkpoints.names import TITAN_0_2, TITAN_0_3, TITAN_2026_09
from ezpz_moe.tools.checkpoints.plan import Convert, RemapPlan, Step

# One for each data-parallel rank: the other dimensions' ranks read the same data.
_POSITION = re.compile(r"dataloader\.dp_rank_\d+")
_POSITION_SINCE_2026_08 = re.compile(r"dataloader\.dp_rank_\d+\..*")
_SCHEDULE = "lr_scheduler"
_LAST_EPOCH = f"{_SCHEDULE}.last_epoch"

UNREAD_POSITION = (
    "The position in the data names {0}, which is not run here: it was copied as it is. Resume "
    "with --checkpoint.exclude_from_loading dataloader, and the data starts over."
)
NO_POSITION = (
    "The position in the data is in a form that torchtitan {0} cannot read: resume with "
    "--checkpoint.exclude_from_loading dataloader, and the data starts over."
)


def add_state(plan: RemapPlan, folder: Path, metadata: Metadata, target: str) -> list[str]:
    """Add to ``plan`` what generation ``target`` needs, and return what the user must know.

    Raises:
        EzpzError: a 0.3 checkpoint has several rates, and 0.2 has room for one.
    """
    positions = _dataloader_form(metadata.state_dict_metadata)
    notes = []
    # None for 2026_09: its positions cannot be made from older ones.
    if (convert := _CONVERT_POSITION.get(target)) is not None:
        if foreign := _foreign_name(folder, metadata):
            notes.append(UNREAD_POSITION.format(foreign))
        else:
            # In place, because the plan is frozen.
            plan.steps[:] = [
                Step(step.source, step.target, convert)
                if _POSITION.fullmatch(step.source.fqn)
                else step
                for step in plan.steps
            ]
    if target == TITAN_0_2 and _LAST_EPOCH in metadata.state_dict_metadata:
        _add_schedule(plan, _schedule(folder, metadata))
    # Before and after August 2026 positions have different forms, in either direction.
    unreadable = positions and (positions == TITAN_2026_09) != (target == TITAN_2026_09)
    if unreadable:
        notes.append(NO_POSITION.format(target))
    return notes


# The position in the data ------------------------------------------------------------------------


def _dataloader_form(names: Iterable[str]) -> str | None:
    for name in names:
        if _POSITION_SINCE_2026_08.fullmatch(name):
            return TITAN_2026_09
        if _POSITION.fullmatch(name):
            return TITAN_0_3
    return None


def _foreign_name(folder: Path, metadata: Metadata) -> str | None:
    """Return what a position names besides plain values; a dataset of the user's may need it."""
    for index, place in metadata.storage_data.items():
        if _POSITION.fullmatch(index.fqn):
            pickled = storage.load(folder, place)
            try:
                load_plain(pickled)
            except Refused as error:
                return str(error)
            except Exception as error:  # a damaged pickle may raise anything
                raise EzpzError(
                    f"{folder / place.relative_path}: {index.fqn} cannot be read: {error}."
                ) from error
    return None


def _pairs(state: dict) -> dict:
    """Make 0.3's buffers from 0.2's: the pairs that 0.2 would have trained on, as one document."""
    if "token_buffer" not in state or "inputs_buffer" in state:
        return {}
    tokens = state["token_buffer"]
    inputs = tokens[:-1]
    positions = list(range(len(inputs)))
    return {"inputs_buffer": inputs, "labels_buffer": tokens[1:], "positions_buffer": positions}


def _tokens(state: dict) -> dict:
    """Make 0.2's buffer from 0.3's. A last label is not an input; the next document begins at 0."""
    if "inputs_buffer" not in state or "token_buffer" in state:
        return {}
    positions = state["positions_buffer"]
    if not positions:
        return {"token_buffer": []}
    # Position 0 begins a document, so the pair before it is the last of its own.
    is_last = (following == 0 for following in (*positions[1:], 0))
    pairs = zip(state["inputs_buffer"], state["labels_buffer"], is_last, strict=True)
    documents = ([token, label] if last else [token] for token, label, last in pairs)
    return {"token_buffer": list(itertools.chain.from_iterable(documents))}


def _everywhere(added: Convert) -> Convert:
    """Add to every dict inside a pickled state: each of the loader's workers has one."""

    def visit(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: visit(value) for key, value in state.items()} | added(state)
        return state

    def convert(pickled: Any) -> Any:
        # Bytes again: the host pickles the loader's state by itself, within what DCP saves.
        return pickle.dumps(visit(load_plain(pickled)))

    return convert


_CONVERT_POSITION = {TITAN_0_3: _everywhere(_pairs), TITAN_0_2: _everywhere(_tokens)}


# The learning rate's schedule ---------------------------------------------------------------------


def _schedule(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Build the state of torch's LambdaLR after ``last_epoch`` steps."""
    entries = {index.fqn: entry for index, entry in metadata.storage_data.items()}

    def number(name: str) -> Any:
        value = storage.load(folder, entries[name])
        if isinstance(value, int | float) or (isinstance(value, torch.Tensor) and not value.dim()):
            return value
        raise EzpzError(f"{folder / entries[name].relative_path}: {name} is not a number.")

    last_epoch = number(_LAST_EPOCH)
    rates = {}
    for key in ("initial_lr", "lr"):
        names = [name for name in entries if _is_group(name) and name.endswith(f".{key}")]
        # 0.3 stores a rate for every parameter. 0.2's schedule has room for one.
        values = {float(number(name)) for name in names}
        if len(values) != 1:
            raise EzpzError(
                f"{folder}: its parameters have {len(values)} values of {key}, but torchtitan 0.2 "
                "has one for all."
            )
        rates[key] = values.pop()
    # Let torch build the state: its format is then the installed torch's own.
    optimizer = torch.optim.SGD([torch.zeros(())], lr=rates["initial_lr"])
    state = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict()
    # LambdaLR takes one step when it is constructed.
    state |= {"_step_count": last_epoch + 1, "_last_lr": [rates["lr"]]}
    return {key: state[key] for key in state.keys() - {"lr_lambdas", "last_epoch"}}


def _is_group(name: str) -> bool:
    return name.startswith("optimizer.param_groups.")


def _add_schedule(plan: RemapPlan, state: dict[str, Any]) -> None:
    for key, value in sorted(state.items()):
        name = f"{_SCHEDULE}.{key}"
        if name not in plan.entries:
            plan.entries[name] = BytesStorageMetadata()
            plan.paths[name] = (_SCHEDULE, key)
            # Write it where last_epoch is.
            source, target = MetadataIndex(_LAST_EPOCH), MetadataIndex(name)
            plan.steps.append(Step(source, target, _always(value)))


def _always(value: Any) -> Convert:
    return lambda _: value
