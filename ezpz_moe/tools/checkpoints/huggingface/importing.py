"""Make a checkpoint of the host from Hugging Face's safetensors, or say why they do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ezpz_moe.errors import EzpzError
from ezpz_moe.tools.checkpoints.folder import atomic_folder, size_of
from ezpz_moe.tools.checkpoints.huggingface.config import TransformersClass, router_differences
from ezpz_moe.tools.checkpoints.huggingface.differences import config_differences, eps_note
from ezpz_moe.tools.checkpoints.huggingface.files import open_file, read_config, weight_map
from ezpz_moe.tools.checkpoints.huggingface.model import Converted, Files, Keys, Model
from ezpz_moe.tools.checkpoints.tensors import check_same, read_whole, write_checkpoint

Config = Mapping[str, Any]


def import_(source: Path, target: Path, model: Model) -> Converted:
    """Write the safetensors in ``source`` as a DCP checkpoint of the model alone.

    Selection biases that the class of transformers does not have are zero.

    Raises:
        EzpzError: a tensor is missing, quantized or of another shape; the model has parameters that
            Hugging Face's format lacks; ``config.json`` or a tensor that would not be used says
            that it is another model; what was written differs; and as :func:`atomic_folder`.
    """
    config, files = read_config(source), weight_map(source)
    if model.form is not None:
        _check_config(source, config, model, model.form)
    keys = {name: _sources(source, name, files, model) for name in model.tensors}
    wanted = {key for of_hf in keys.values() for key in of_hf}
    _check_not_quantized(source, files, model)
    if missing := sorted(wanted - files.keys()):
        raise EzpzError(
            f"{source}: has no {missing[0]}; {len(missing)} of {len(wanted)} tensors are missing. "
            "Is this the model's flavor?"
        )
    unused = sorted(files.keys() - wanted)
    _check_unused(source, unused, files, config)
    needed = size_of({source / file for file in files.values()})
    with atomic_folder(target, source=source, needed=needed) as partial:
        written = write_checkpoint(
            partial, ((name, model.native(source, files, name, keys[name])) for name in keys)
        )
        for name in keys:
            back = model.native(source, files, name, keys[name])
            check_same(partial, source, name, read_whole(partial, written, name), back)
    return Converted(len(keys), tuple(unused), tuple(_import_notes(config, keys, model)))


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
        raise EzpzError(
            f"{source}: {key} is quantized ({kind}). Save the model in bfloat16 first, with "
            f"transformers: AutoModelForCausalLM.from_pretrained(..., quantization_config={config}"
            "(dequantize=True)).save_pretrained(...)."
        )


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


def _check_config(
    source: Path, config: Config | None, model: Model, form: TransformersClass
) -> None:
    differences = [*form.differences, *(() if config is None else config_differences(config, form))]
    if differences:
        raise EzpzError(
            f"{source}: is not what flavor {model.flavor.name} computes (for transformers, "
            f"{form.name}): {'; '.join(differences)}."
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


def _import_notes(config: Config | None, keys: Mapping[str, Keys], model: Model) -> list[str]:
    notes = list(eps_note(config, model.form)) if config and model.form else []
    if any(not keys[name] for name in model.buffers):
        notes.append("The experts' selection biases, which the other format lacks, are zero.")
    changes = list(router_differences(model.flavor, step=1))
    if changes:
        notes.append(f"The flavor computes something else with it: {'; '.join(changes)}.")
    return notes
