"""Make a checkpoint of the host from Hugging Face's safetensors, or say why they do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.data_files import size_of
from ezpz_moe.tools.checkpoints.expert_order import read_order, write_order
from ezpz_moe.tools.checkpoints.folder import atomic_folder
from ezpz_moe.tools.checkpoints.huggingface.differences import check_config
from ezpz_moe.tools.checkpoints.huggingface.files import (
    CONFIG,
    Files,
    how_to_dequantize,
    open_file,
    read_config,
    weight_map,
)
from ezpz_moe.tools.checkpoints.huggingface.model import Converted, Keys, Model
from ezpz_moe.tools.checkpoints.huggingface.routers import router_differences
from ezpz_moe.tools.checkpoints.huggingface.tied import find_tied, tied_notes
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Importable:
    """Safetensors that have been found to hold the flavor's model.

    Attributes:
        names: the model's parameters and buffers.
        unused: tensors of the folder that the model does not need.
        notes: what the user should know about the model.
    """

    names: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]
    _source: Path
    _model: Model
    _files: Files
    _keys: Mapping[str, Keys]
    _origins: Mapping[str, str]

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter in the host's form.

        Raises:
            EzpzError: as :meth:`Model.native`.
        """
        of = self._origins[name]
        return self._model.native(self._source, self._files, of, self._keys[of])

    @property
    def bytes(self) -> int:
        """The size of the files that hold the model."""
        return size_of({self._source / file for file in self._files.values()})


def check_importable(source: Path, model: Model) -> Importable:
    """Check that the safetensors in ``source`` hold the model, without reading their values.

    Raises:
        EzpzError: a tensor is missing or quantized; the model has parameters that Hugging Face's
            format lacks; ``config.json`` or a tensor that would not be used says that it is another
            model.
    """
    config, files = read_config(source), weight_map(source)
    computed = f"what flavor {model.flavor.name} computes"
    notes = check_config(source, model.form, computed) if model.form else []
    keys = {name: _sources(source, name, files, model) for name in model.tensors}
    wanted = {key for of_hf in keys.values() for key in of_hf}
    _check_not_quantized(source, files, model)
    tied = find_tied(source, files)
    _check_complete(source, wanted, files.keys() | tied.keys(), config)
    unused = sorted(files.keys() - wanted)
    _check_unused(source, unused, files, config)
    notes += [*tied_notes(tied), *_import_notes(keys, model)]
    origins = _origins(keys, tied)
    return Importable(tuple(keys), tuple(unused), tuple(notes), source, model, files, keys, origins)


def import_(source: Path, target: Path, model: Model) -> Converted:
    """Write the safetensors in ``source`` as a DCP checkpoint of the model alone.

    Selection biases that the class of transformers does not have are zero. A matrix that is absent
    because ``config.json`` ties it is a copy of the other.

    Raises:
        EzpzError: what was written differs; and as :func:`check_importable`,
            :meth:`Importable.read` and :func:`atomic_folder`.
    """
    found, order = check_importable(source, model), read_order(source)
    with atomic_folder(target, source=source, needed=found.bytes) as partial:
        written = write_checkpoint(partial, ((name, found.read(name)) for name in found.names))
        write_order(partial, order)
        for name in found.names:
            back = found.read(name)
            check_same(partial, source, name, read_whole(partial, written, name), back)
    return Converted(len(found.names), found.unused, found.notes)


def _origins(keys: Mapping[str, Keys], tied: Mapping[str, str]) -> dict[str, str]:
    """Map each parameter to the one whose tensors it is made from: itself, unless it is tied."""
    names = {key: name for name, of_hf in keys.items() for key in of_hf}
    copies = {names[absent]: names[present] for absent, present in tied.items()}
    return {name: copies.get(name, name) for name in keys}


def _check_not_quantized(source: Path, files: Files, model: Model) -> None:
    """Check that no tensor has scales beside it: without them it would be another one."""
    for suffix, kind, config in (
        ("_proj_blocks", "MXFP4", "Mxfp4Config"),
        (".weight_scale_inv", "FP8", "FineGrainedFP8Config"),
    ):
        if not (found := [key for key in files if key.endswith(suffix)]):
            continue
        key = found[0].removesuffix("_scale_inv")
        # The only adapter of the host's that reads scales as transformers writes them.
        if kind == "FP8" and model.form is not None and model.form.biases:
            raise EzpzError(
                f"{source}: {key} is quantized ({kind}). The trainer reads such weights with their "
                "scales: --checkpoint.enable --checkpoint.initial_load_in_hf "
                "--checkpoint.initial_load_in_hf_quantized --checkpoint.initial_load_path "
                f"{source.absolute()}"
            )
        raise EzpzError(f"{source}: {key} is quantized ({kind}). {how_to_dequantize(config)}")


def _sources(source: Path, name: str, files: Files, model: Model) -> Keys:
    """Return the tensors that a parameter is made from; none for a bias that is zero."""
    keys = model.keys(name)
    is_bias = name in model.buffers
    if is_bias and (not keys or (model.loses_biases and not files.keys() & keys.keys())):
        return {}
    if not keys:
        raise EzpzError(
            f"{source}: the host's adapter does not make {name} on its own from tensors of Hugging "
            "Face's format, so ezpz_moe cannot import this model."
        )
    return keys


def _check_complete(source: Path, wanted: Set[str], found: Set[str], config: Config | None) -> None:
    if not (missing := sorted(wanted - found)):
        return
    # Other methods than those of _check_not_quantized() name and cut tensors in their own ways.
    if (config or {}).get("quantization_config"):
        why = f"{CONFIG} says that they are quantized: save the model in bfloat16 first."
    else:
        why = "Is this the model's flavor?"
    raise EzpzError(
        f"{source}: has no {missing[0]}; {len(missing)} of {len(wanted)} tensors are missing. {why}"
    )


def _check_unused(source: Path, unused: list[str], files: Files, config: Config | None) -> None:
    """Check that the tensors that the model does not use would not change what it computes."""
    layers = (config or {}).get("num_hidden_layers")
    for key in unused:
        # Few digits: int() refuses more than 4300 of them, and the name is a stranger's.
        match = re.match(r"model\.layers\.(\d{1,9})\.", key)
        # Layers after the last of the model predict further tokens.
        is_further = match and isinstance(layers, int) and int(match[1]) >= layers
        if key.endswith("rotary_emb.inv_freq") or is_further or _is_zero(source, files[key], key):
            continue
        raise EzpzError(
            f"{source}: {key} has no place in the flavor's model, which would compute something "
            f"else without it ({len(unused)} tensors are not used)."
        )


def _is_zero(source: Path, file: str, key: str) -> bool:
    """Return whether the tensor is a bias of zeros."""
    if not key.endswith("bias"):
        return False
    with open_file(source / file) as opened:
        return not opened.get_tensor(key).any()


def _import_notes(keys: Mapping[str, Keys], model: Model) -> list[str]:
    notes = []
    if any(not keys[name] for name in model.buffers):
        notes.append("The experts' selection biases, which the other format lacks, are zero.")
    changes = list(router_differences(model.flavor, step=1))
    if changes:
        notes.append(f"The flavor computes something else with it: {'; '.join(changes)}.")
    return notes
