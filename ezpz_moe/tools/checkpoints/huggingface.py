"""A model's tensors to and from Hugging Face's safetensors, through the host's own adapter.

The adapter (``to_hf``, ``from_hf``) converts one parameter at a time. Memory then holds one
parameter and what it becomes, besides the file that is being filled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints import contents, storage
from ezpz_moe.tools.checkpoints.folder import atomic_folder, size_of
from ezpz_moe.tools.checkpoints.names import current_name
from ezpz_moe.tools.checkpoints.safetensors_files import read_tensors, weight_map
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint

INDEX = "model.safetensors.index.json"
_FILE_BYTES = 2 * 2**30
"""Close a file when it holds this much, which is also how much of it is in memory."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """What the host knows of a model.

    Attributes:
        generation: the one that uses these parameter names.
        adapter: the host's, with ``to_hf`` and ``from_hf``.
        tensors: its parameters and buffers on the meta device, by name.
        buffers: the names that are buffers.
    """

    generation: str
    adapter: Any
    tensors: Mapping[str, torch.Tensor]
    buffers: frozenset[str]

    def keys(self, name: str) -> dict[str, torch.Size]:
        """Return Hugging Face's tensors that hold a parameter; empty if none does."""
        to_hf = self.adapter.to_hf({name: self.tensors[name]})
        return {key: tensor.shape for key, tensor in to_hf.items()}


@dataclass(frozen=True)
class Converted:
    """What was done: how many tensors were written, and which have no counterpart."""

    tensors: int
    left_out: tuple[str, ...]


def is_safetensors(folder: Path) -> bool:
    """Return whether ``folder`` holds Hugging Face's safetensors, or an index that names some."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()


def convert(source: Path, target: Path, to: str, model: Model) -> Converted:
    """Call :func:`export` for "hf", or :func:`import_` for the installed host's generation.

    Raises:
        EzpzError: as these two; or safetensors should become a checkpoint of another host.
    """
    if to == "hf":
        return export(source, target, model)
    to = current_name(to)
    if to != model.generation:
        raise EzpzError(
            f"{source}: the installed host writes the names of torchtitan {model.generation}, not "
            f"{to}. Use --to {model.generation}, then run ezpz-moe ckpt remap again."
        )
    return import_(source, target, model)


def export(source: Path, target: Path, model: Model) -> Converted:
    """Write the model of the DCP checkpoint in ``source`` as safetensors, then compare.

    Raises:
        EzpzError: the checkpoint has another generation's names or another model; what was written
            differs; and as :func:`atomic_folder`.
    """
    metadata = storage.read_metadata(source)
    storage.check_data(source, metadata)
    if (generation := contents.generation(source, metadata)) != model.generation:
        raise EzpzError(
            f"{source}: has the names of torchtitan {generation}, but the host's adapter knows "
            f"those of {model.generation}. First run: ezpz-moe ckpt remap {source} DIR --to "
            f"{model.generation}"
        )
    entries = dict(contents.model_tensors(metadata))
    check_model(source, {name: entry.size for name, entry in entries.items()}, model.tensors)
    keys = {name: model.keys(name) for name in entries}
    left_out = tuple(name for name in entries if not keys[name])
    if lacking := [name for name in left_out if name not in model.buffers]:
        raise EzpzError(
            f"{source}: the host's adapter has no counterpart for {some(lacking)}, so the model "
            "would be incomplete."
        )
    bytes_of = {
        name: entry.size.numel() * entry.properties.dtype.itemsize
        for name, entry in entries.items()
        if keys[name]
    }
    with atomic_folder(target, source=source, needed=sum(bytes_of.values())) as partial:
        files = _write_safetensors(partial, source, metadata, bytes_of, model)
        for name in bytes_of:
            # Back through the adapter: this also finds an adapter that loses something on the way.
            back = _native(partial, files, name, keys[name], model)
            check_same(partial, source, name, back, read_whole(source, metadata, name))
    return Converted(len(files), left_out)


def _write_safetensors(
    target: Path, source: Path, metadata: Metadata, bytes_of: Mapping[str, int], model: Model
) -> dict[str, str]:
    """Write the files and their index; return which file has which tensor."""
    files: dict[str, str] = {}
    groups = _grouped(bytes_of)
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        written: Tensors = {}
        for name in names:
            written |= model.adapter.to_hf({name: read_whole(source, metadata, name)})
        # Experts are views of one tensor, which safetensors refuses to write.
        copies = {key: tensor.clone() for key, tensor in written.items()}
        save_file(copies, target / file, {"format": "pt"})
        files |= dict.fromkeys(written, file)
    index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": files}
    (target / INDEX).write_text(json.dumps(index, indent=2))
    return files


def import_(source: Path, target: Path, model: Model) -> Converted:
    """Write the safetensors in ``source`` as a DCP checkpoint of the model alone.

    Raises:
        EzpzError: a tensor is missing, quantized or of another shape; the model has parameters that
            Hugging Face's format lacks; what was written differs; and as :func:`atomic_folder`.
    """
    files = weight_map(source)
    keys = {name: model.keys(name) for name in model.tensors}
    if lacking := [name for name in keys if not keys[name]]:
        raise EzpzError(
            f"{source}: the host's adapter has no counterpart for {some(lacking)}. Let the trainer "
            "load the model, which leaves them at their initial values: "
            "--checkpoint.initial_load_in_hf --checkpoint.initial_load_path."
        )
    wanted = [key for name in keys for key in keys[name]]
    if missing := [key for key in wanted if key not in files]:
        raise EzpzError(
            f"{source}: has no {missing[0]}; {len(missing)} of {len(wanted)} tensors are missing. "
            "Is this the model's flavor?"
        )
    needed = size_of(source.glob("*.safetensors"))
    with atomic_folder(target, source=source, needed=needed) as partial:
        written = write_checkpoint(
            partial, ((name, _native(source, files, name, keys[name], model)) for name in keys)
        )
        for name in keys:
            back = _native(source, files, name, keys[name], model)
            check_same(partial, source, name, read_whole(partial, written, name), back)
    return Converted(len(keys), tuple(sorted(files.keys() - set(wanted))))


def some(names: list[str]) -> str:
    """List up to three of the names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if names[3:] else "")


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


def _grouped(bytes_of: Mapping[str, int]) -> list[list[str]]:
    """Group parameters by file, in order."""
    groups: list[list[str]] = []
    room = 0
    for name, size in bytes_of.items():
        if size > room or not groups:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(name)
        room -= size
    return groups


def _native(
    folder: Path,
    files: Mapping[str, str],
    name: str,
    keys: Mapping[str, torch.Size],
    model: Model,
) -> torch.Tensor:
    """Make a parameter in the host's form from its tensors in the safetensors."""
    tensors = dict(read_tensors(folder, files, keys))
    tensor = model.adapter.from_hf(tensors)[name]
    if tensor.shape != model.tensors[name].shape:
        raise EzpzError(
            f"{folder}: gives {name} the shape {list(tensor.shape)}, but the flavor's model has "
            f"{list(model.tensors[name].shape)}."
        )
    return tensor
