"""Checkpoints of the host's generations: what wrote one, and the same one under other names.

Generations differ in the names of parameters and not in what a parameter holds, so a checkpoint of
torch.distributed.checkpoint (DCP) is renamed by rewriting its ``.metadata``: the data files, where
the tensors are, are copied as they are. No tensor is ever in memory, and no bit can change.
"""

from __future__ import annotations

import filecmp
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from ezpz_moe.errors import EzpzError

TITAN_0_2, TITAN_0_3 = "0.2", "0.3"
_METADATA = ".metadata"
_STEP = "train_state.step"
_TRAINING_STATE = {"optimizer", "lr_scheduler", "dataloader", "train_state"}


@dataclass(frozen=True)
class Rename:
    """One part of a parameter's name in torchtitan 0.2 and from 0.3 on.

    Attributes:
        old: dotted part of the name in 0.2.
        new: the same in 0.3.
        beside: a part of some name, in both generations, of the checkpoints that this applies to.
    """

    old: str
    new: str
    beside: str = ""


RENAMES = (
    Rename("output.weight", "lm_head.weight"),
    Rename("moe.expert_bias", "moe.expert_bias_E"),
    Rename("moe.experts.w1", "moe.routed_experts.inner_experts.w1_EFD"),
    Rename("moe.experts.w2", "moe.routed_experts.inner_experts.w2_EDF"),
    Rename("moe.experts.w3", "moe.routed_experts.inner_experts.w3_EFD"),
    Rename("moe.experts.mlp1_weight", "moe.routed_experts.inner_experts.mlp1_weight_EGD"),
    Rename("moe.experts.mlp1_bias", "moe.routed_experts.inner_experts.mlp1_bias_EG"),
    Rename("moe.experts.mlp2_weight", "moe.routed_experts.inner_experts.mlp2_weight_EDF"),
    Rename("moe.experts.mlp2_bias", "moe.routed_experts.inner_experts.mlp2_bias_ED"),
    # Latent attention (deepseek_v3) has a wq too, and it keeps its name.
    Rename("attention.wq", "attention.qkv_linear.wq", beside="wk"),
    Rename("attention.wk", "attention.qkv_linear.wk", beside="wk"),
    Rename("attention.wv", "attention.qkv_linear.wv", beside="wk"),
)


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds, read from its metadata alone (and the step from one small entry)."""

    generation: str
    step: int | None
    layers: int
    experts: int
    parameters: int
    dtypes: tuple[str, ...]
    optimizer: bool
    files: int
    bytes: int


def inspect(folder: Path) -> Contents:
    """What the checkpoint in ``folder`` holds, and which generation wrote it.

    Raises:
        EzpzError: ``folder`` holds no DCP checkpoint, or one of no known generation.
    """
    metadata = _read(folder)
    model = dict(_model_tensors(metadata))
    data = _data_files(folder)
    return Contents(
        generation=_generation(folder, metadata.state_dict_metadata),
        step=_step(folder, metadata),
        layers=len({match[1] for name in model if (match := re.match(r"layers\.(\d+)\.", name))}),
        experts=max((each.size[0] for name, each in model.items() if _is_expert(name)), default=0),
        parameters=sum(each.size.numel() for each in model.values()),
        dtypes=tuple(sorted({str(each.properties.dtype) for each in model.values()})),
        optimizer=any(name.startswith("optimizer.") for name in metadata.state_dict_metadata),
        files=len(data),
        bytes=sum(file.stat().st_size for file in data),
    )


def remap(
    source: Path, target: Path, to: str, *, progress: Callable[[list[Path]], Iterable[Path]] = iter
) -> int:
    """Write the checkpoint in ``source`` to ``target`` under the names of generation ``to``.

    Atomic: ``target`` appears when everything has been written and compared with the source. What
    a killed run leaves ends in ``.partial``, and the next run removes it.

    Returns:
        How many names changed.

    Raises:
        EzpzError: no checkpoint in ``source``; it has those names already; ``target`` exists; the
            disk is too small; what was written differs.
    """
    metadata = _read(source)
    names = metadata.state_dict_metadata
    if (generation := _generation(source, names)) == to:
        raise EzpzError(f"{source}: has the names of torchtitan {to} already.")
    if target.exists():
        raise EzpzError(f"{target}: exists already. Choose another folder, or remove it.")
    files = _data_files(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(f.stat().st_size for f in files), shutil.disk_usage(target.parent).free
    if needed > free:
        raise EzpzError(f"{target}: needs {needed} bytes, and the disk has {free} free.")
    rename = _renaming(names, to)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in progress(files):
        shutil.copy2(file, partial / file.name)
    _write(partial, _renamed(metadata, rename))
    _verify(source, partial, generation)
    partial.rename(target)
    return sum(rename(name) != name for name in names)


def _read(folder: Path) -> Metadata:
    if not (folder / _METADATA).is_file():
        steps = sorted(path.parent for path in folder.glob(f"step-*/{_METADATA}"))
        hint = f" There are checkpoints below it, such as {steps[-1]}." if steps else ""
        raise EzpzError(
            f"{folder}: holds no checkpoint of torch.distributed.checkpoint (no .metadata).{hint}"
        )
    try:
        return FileSystemReader(folder).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
        raise EzpzError(f"{folder / _METADATA}: cannot be read: {error}.") from error


def _data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"))


def _generation(folder: Path, names: Iterable[str]) -> str:
    """By the names of the experts, or of the output matrix."""
    for generation, other in ((TITAN_0_3, TITAN_0_2), (TITAN_0_2, TITAN_0_3)):
        to_other = _renaming(names, other)
        if any(to_other(name) != name for name in names):
            return generation
    raise EzpzError(f"{folder}: its names are those of no generation of torchtitan that we know.")


def _renaming(names: Iterable[str], to: str) -> Callable[[str], str]:
    """What a name of any generation becomes in generation ``to``."""
    parts = {part for name in names for part in name.split(".")}
    pairs = [
        (each.new, each.old) if to == TITAN_0_2 else (each.old, each.new)
        for each in RENAMES
        if not each.beside or each.beside in parts
    ]
    patterns = [(re.compile(rf"(?<![^.]){re.escape(a)}(?![^.])"), b) for a, b in pairs]

    def rename(name: str) -> str:
        for pattern, replacement in patterns:
            renamed = pattern.sub(replacement, name)
            if renamed != name:
                return renamed
        return name

    return rename


def _renamed(metadata: Metadata, rename: Callable[[str], str]) -> Metadata:
    """The metadata with every name changed, in all the places where DCP keeps one."""
    return replace(
        metadata,
        state_dict_metadata={rename(n): m for n, m in metadata.state_dict_metadata.items()},
        planner_data={
            rename(name): tuple(rename(p) if isinstance(p, str) else p for p in path)
            for name, path in (metadata.planner_data or {}).items()
        },
        storage_data={
            replace(index, fqn=rename(index.fqn)): info
            for index, info in metadata.storage_data.items()
        },
    )


def _write(folder: Path, metadata: Metadata) -> None:
    with (folder / _METADATA).open("wb") as file:
        pickle.dump(metadata, file)
        file.flush()
        os.fsync(file.fileno())


def _verify(source: Path, written: Path, generation: str) -> None:
    """Data files byte by byte; and the names, renamed back, are those of the source."""
    files = [file.name for file in _data_files(source)]
    _, different, unreadable = filecmp.cmpfiles(source, written, files, shallow=False)
    if different or unreadable:
        raise EzpzError(f"{written}: {', '.join(different + unreadable)} differ from {source}.")
    before, after = _read(source), _read(written)
    back = _renamed(after, _renaming(after.state_dict_metadata, generation))
    for place in ("state_dict_metadata", "planner_data", "storage_data"):
        if getattr(back, place) != getattr(before, place):
            raise EzpzError(f"{written}: the names do not lead back to those of {source}.")


def _model_tensors(metadata: Metadata) -> Iterator[tuple[str, TensorStorageMetadata]]:
    for name, entry in metadata.state_dict_metadata.items():
        of_model = name.partition(".")[0] not in _TRAINING_STATE
        if isinstance(entry, TensorStorageMetadata) and of_model:
            yield name, entry


def _is_expert(name: str) -> bool:
    return ".moe.experts." in name or ".moe.routed_experts." in name


def _step(folder: Path, metadata: Metadata) -> int | None:
    """The training step; a checkpoint of the model alone has none but its folder's name."""
    if _STEP in metadata.state_dict_metadata:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is one process, which is meant so
            state: Any = _load_state_dict_from_keys({_STEP}, checkpoint_id=folder)
        return int(state["train_state"]["step"])
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else None
