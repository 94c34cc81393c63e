"""What a checkpoint holds, read from its metadata alone (the step: from one small entry)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.dcp import stand_ins
from ezpz_moe.hosts.dcp.paths import refuse_other_folders
from ezpz_moe.tools.checkpoints import data_files, names
from ezpz_moe.tools.checkpoints.expert_order import read_order

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

    AnyMetadata: TypeAlias = Metadata | stand_ins.Metadata

_STEP = "train_state.step"
# The host saves the model's tensors at the top level, beside these: a name that begins with none of
# them is the model's.
_TRAINING_STATE = {"optimizer", "lr_scheduler", "dataloader", "train_state"}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        generation: the host's, recognized by the names: "0.2", "0.3" or "2026_09".
        experts: per layer.
        parameters: how many numbers the model's tensors hold, buffers included.
        dtypes: of the model's tensors.
        optimizer: whether the optimizer's state is included.
        reordered: layers whose experts have other numbers than at first.
        files: the number of data files.
        bytes: of all data files together.
    """

    generation: str
    step: int | None
    layers: int
    experts: int
    parameters: int
    dtypes: tuple[str, ...]
    optimizer: bool
    reordered: tuple[int, ...]
    files: int
    bytes: int


def inspect(folder: Path) -> Contents:
    """Find out what the checkpoint in ``folder`` holds, and which generation wrote it.

    Raises:
        EzpzError: ``folder`` holds no DCP checkpoint, an incomplete one, or one of an unknown
            generation.
    """
    refuse_other_folders(folder)
    metadata = stand_ins.read_metadata(folder) or _read_by_torch(folder)
    data_files.check_data(folder, metadata)
    model = dict(model_tensors(metadata))
    data = data_files.data_files(folder, metadata)
    return Contents(
        generation=generation(folder, metadata),
        step=step(folder, metadata),
        layers=len({match[1] for name in model if (match := re.match(r"layers\.(\d+)\.", name))}),
        # Every tensor of experts has E first; layers may differ in it.
        experts=max((sum(e.size[:1]) for name, e in model.items() if _is_expert(name)), default=0),
        parameters=sum(each.size.numel() for each in model.values()),
        dtypes=tuple(sorted({str(each.properties.dtype) for each in model.values()})),
        optimizer=has_optimizer(metadata),
        reordered=tuple(sorted(read_order(folder))),
        files=len(data),
        bytes=data_files.size_of(data),
    )


def _read_by_torch(folder: Path) -> Metadata:
    # Not at the top: its import takes longer than all that is done here.
    from ezpz_moe.tools.checkpoints import storage

    return storage.read_metadata(folder)


def generation(folder: Path, metadata: AnyMetadata) -> str:
    """Return the generation that wrote the checkpoint.

    Raises:
        EzpzError: it is unknown.
    """
    if found := names.generation_of(metadata.state_dict_metadata):
        return found
    raise EzpzError(f"{folder}: its names match no generation of torchtitan that we know.")


def has_optimizer(metadata: AnyMetadata) -> bool:
    """Return whether a run can resume from the checkpoint; otherwise it holds the model alone."""
    return any(name.startswith("optimizer.") for name in metadata.state_dict_metadata)


def model_tensors(metadata: AnyMetadata) -> Iterator[tuple[str, Any]]:
    """Yield the model's parameters and buffers, without the training state."""
    for name, entry in metadata.state_dict_metadata.items():
        # Of torch's class or its stand-in: an entry that is no tensor has no chunks.
        if hasattr(entry, "chunks") and name.partition(".")[0] not in _TRAINING_STATE:
            yield name, entry


def _is_expert(name: str) -> bool:
    return ".moe.experts." in name or ".moe.routed_experts." in name


def step(folder: Path, metadata: AnyMetadata) -> int | None:
    """Return the step. A checkpoint of the model alone has it in the folder's name only.

    Raises:
        EzpzError: the checkpoint's own step cannot be read, or is not a number.
    """
    for index, entry in metadata.storage_data.items():
        # The only entry that is read; it is a few bytes.
        if index.fqn == _STEP:
            saved = data_files.whole_number(folder, entry)
            return _step_by_torch(folder, entry) if saved is None else saved
    # resolve(), because the folder may be named by a link, or be ".".
    match = re.fullmatch(r"step-(\d+)", folder.resolve().name)
    return int(match[1]) if match else None


def _step_by_torch(folder: Path, entry: Any) -> int:
    """Read a step that is saved as a tensor, or say what is wrong with it."""
    from ezpz_moe.tools.checkpoints import storage

    saved = storage.load(folder, entry)
    try:
        return int(saved)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EzpzError(f"{folder / entry.relative_path}: {_STEP} is not a number.") from error


def metadata_of_model(
    folder: Path, generation_here: str, tensors: Mapping[str, torch.Tensor]
) -> Metadata:
    """Return the metadata of a checkpoint that holds the flavor's model. Reads no data.

    Args:
        folder: the checkpoint's.
        generation_here: whose names the tensors have, the installed host's.
        tensors: the flavor's, by name.

    Raises:
        EzpzError: the checkpoint is incomplete, or of another generation or model.
    """
    metadata = _read_by_torch(folder)
    data_files.check_data(folder, metadata)
    if (found := generation(folder, metadata)) != generation_here:
        raise EzpzError(
            f"{folder}: has the names of torchtitan {found}. First run: ezpz-moe ckpt remap "
            f"{folder} DIR --to {generation_here}"
        )
    check_model(folder, {name: each.size for name, each in model_tensors(metadata)}, tensors)
    return metadata


def check_model(
    source: Path, sizes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Check that a checkpoint has the flavor's tensors, by names and sizes.

    Raises:
        EzpzError: it belongs to another model.
    """
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    # Before anything is converted: a wrong flavor would otherwise fail in the adapter, with an
    # error that does not say so.
    if sizes != expected:
        # One example is enough: a wrong flavor differs in almost every tensor.
        name = next(n for n in [*sizes, *expected] if sizes.get(n) != expected.get(n))
        has, wants = (
            f"{list(shapes[name])}" if name in shapes else "nothing" for shapes in (sizes, expected)
        )
        raise EzpzError(
            f"{source}: is not the flavor's model: {name} is {has} in the checkpoint and "
            f"{wants} in the flavor's model."
        )
