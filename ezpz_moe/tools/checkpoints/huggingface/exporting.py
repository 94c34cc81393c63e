"""Write the model of a checkpoint as a folder that transformers opens, or say why it would differ.

Parameters are converted one at a time, by the host's own adapter. Memory then holds one parameter
and what it becomes, besides the file that is being filled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import Metadata

from ezpz_moe.errors import EzpzError, some
from ezpz_moe.hosts.dcp.paths import INDEX, is_safetensors
from ezpz_moe.tools.checkpoints import contents, storage
from ezpz_moe.tools.checkpoints.expert_order import read_order, write_order
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.huggingface.card import Origin, check_tokenizer, write_description
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass
from ezpz_moe.tools.checkpoints.huggingface.model import Converted, Keys, Model
from ezpz_moe.tools.checkpoints.huggingface.routers import router_differences
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole

_FILE_BYTES = 2 * 2**30
"""Close a file when it holds this much, which is also how much of it is in memory."""
Tensors = dict[str, torch.Tensor]
_EMBEDDING = "tok_embeddings.weight"


def export(
    source: Path, target: Path, model: Model, measure: Callable[[], str] | None = None
) -> Converted:
    """Write the model of the DCP checkpoint in ``source`` for transformers, then compare.

    Args:
        measure: says what the model loses without its selection biases. Needed to leave out biases
            that are not zero.

    Raises:
        EzpzError: the checkpoint has another generation's names or another model; no class of
            transformers computes it; it has biases that the class has no place for, and there is no
            ``measure``; what was written differs; and as :func:`atomic_folder`.
    """
    _check_source(source, model)
    step = contents.inspect(source).step
    if model.form is not None:
        _check_class(source, model, model.form, step)
    metadata = contents.metadata_of_model(source, model.generation, model.tensors)
    order = read_order(source)
    if model.tokenizer is not None:
        check_tokenizer(model.tokenizer, len(model.tensors[_EMBEDDING]), model.flavor.name)
    lost = model.buffers if model.loses_biases else ()
    keys = {name: {} if name in lost else model.keys(name) for name in model.tensors}
    left_out = tuple(name for name, of_hf in keys.items() if not of_hf)
    if lacking := [name for name in left_out if name not in model.buffers]:
        raise EzpzError(
            f"{source}: Hugging Face's format has no counterpart for {some(lacking)}, so the model "
            "would be incomplete."
        )
    said = _without_biases(source, metadata, model, left_out, measure)
    keys = {name: of_hf for name, of_hf in keys.items() if of_hf}
    with atomic_folder(target, source=source, needed=_bytes(metadata, keys)) as partial:
        files = _write_safetensors(partial, source, metadata, keys, model)
        if model.form is not None:
            origin = Origin(
                flavor=model.flavor,
                step=step,
                dtype=metadata.state_dict_metadata[_EMBEDDING].properties.dtype,
                parameters=sum(model.tensors[name].numel() for name in keys),
                left_out=said,
            )
            write_description(partial, model.form, origin, model.tokenizer)
        write_order(partial, order)
        for name, of_hf in keys.items():
            # Back through the adapter: this also finds an adapter that loses something on the way.
            back = model.native(partial, files, name, of_hf)
            check_same(partial, source, name, back, read_whole(source, metadata, name))
    notes = tuple(_export_notes(model, left_out, said))
    return Converted(len(files), left_out, notes)


def _check_source(source: Path, model: Model) -> None:
    if is_safetensors(source) and not (source / storage.METADATA).exists():
        raise EzpzError(
            f"{source}: holds safetensors, which --to hf writes. Name a checkpoint of torchtitan, "
            f"or make one of this folder, with --to {model.generation}."
        )


def _check_class(source: Path, model: Model, form: TransformersClass, step: int | None) -> None:
    # A scheduled temperature depends on the step.
    if differences := [*form.differences, *router_differences(model.flavor, step)]:
        raise EzpzError(
            f"{source}: ezpz_moe knows no class of transformers that computes the model of flavor "
            f"{model.flavor.name}. {form.name} comes closest, but: {'; '.join(differences)}."
        )


def _without_biases(
    source: Path,
    metadata: Metadata,
    model: Model,
    names: tuple[str, ...],
    measure: Callable[[], str] | None,
) -> str:
    """Return what the model loses without these biases; nothing if they are zero."""
    biases = {name: read_whole(source, metadata, name) for name in names}
    trained = [name for name, bias in biases.items() if bias.any()]
    if not trained:
        return ""
    if measure is None:
        largest = max(biases[name].abs().max().item() for name in trained)
        raise EzpzError(
            f"{source}: {some(trained)} choose experts (biases up to {largest:.2g}), and "
            f"{model.form.name if model.form else 'the other format'} has no place for them. With "
            "--drop-bias they are left out, and it says how many choices change."
        )
    return measure()


def _export_notes(model: Model, left_out: tuple[str, ...], said: str) -> list[str]:
    if model.form is None:
        return ["config.json was not written: ezpz_moe reads models of torchtitan 0.3 and later."]
    notes = [f"Open it with transformers: {model.form.name}.", *model.form.notes]
    if model.flavor.router.gate_precision == "bfloat16":
        notes.append("The router computed its logits in bfloat16, transformers rounds them less.")
    if left_out:
        notes.insert(0, f"Left out: {said}." if said else "The biases that were left out are zero.")
    if model.tokenizer is None:
        notes.append("No tokenizer was written: --model names a flavor. Name the job to add it.")
    return notes


def _bytes(metadata: Metadata, names: Iterable[str]) -> int:
    entries = [metadata.state_dict_metadata[name] for name in names]
    return sum(each.size.numel() * each.properties.dtype.itemsize for each in entries)


def _write_safetensors(
    target: Path, source: Path, metadata: Metadata, names: Mapping[str, Keys], model: Model
) -> dict[str, str]:
    """Write the files and their index; return which file has which tensor."""
    files: dict[str, str] = {}
    groups = _grouped({name: _bytes(metadata, [name]) for name in names})
    size = 0
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        written: Tensors = {}
        for name in group:
            written |= model.adapter.to_hf({name: read_whole(source, metadata, name)})
        if number == len(groups) and model.form is not None:
            # The class has a bias in every layer, also if the run had none.
            missing = model.form.biases.keys() - files.keys() - written.keys()
            written |= {key: torch.zeros(model.form.biases[key]) for key in sorted(missing)}
        # Experts are views of one tensor, which safetensors refuses to write.
        copies = {
            key: tensor.clone(memory_format=torch.contiguous_format)
            for key, tensor in written.items()
        }
        # The metadata that transformers' save_pretrained() writes.
        save_file(copies, target / file, {"format": "pt"})
        files |= dict.fromkeys(written, file)
        size += sum(tensor.nbytes for tensor in copies.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (target / INDEX).write_text(json.dumps(index, indent=2))
    return files


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
