"""Hugging Face's safetensors on a disk: which file holds a tensor, and reading it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ezpz_moe.errors import EzpzError, printable
from ezpz_moe.hosts.dcp.paths import CONFIG, INDEX
from ezpz_moe.hosts.dcp.structure import is_below

Files = Mapping[str, str]
"""Tensor -> the file that holds it."""


def weight_map(folder: Path) -> dict[str, str]:
    """Map each tensor's name to the file that holds it.

    With an index these are the tensors and files that it names, and nothing else; without one, all
    files that end in ``.safetensors``.

    Raises:
        EzpzError: there is no such file; one cannot be read; the index is damaged, or names a file
            or a tensor that is not there; or two files hold the same tensor.
    """
    index = _read_index(folder / INDEX)
    if index is None:
        return _held(folder, {file.name for file in folder.glob("*.safetensors")})
    held = _held(folder, set(index.values()))
    # What is in a file counts; the index may be that of an older download.
    for key, name in index.items():
        if held.get(key) != name:
            raise EzpzError(
                f"{folder / INDEX}: says that {key!r} is in {name}, where it is not. Download the "
                "index and the files again, together."
            )
    return index


def _held(folder: Path, names: Set[str]) -> dict[str, str]:
    """Return which of the files holds which tensor."""
    if not names:
        raise EzpzError(f"{folder}: holds no safetensors.")
    held: dict[str, str] = {}
    for name in sorted(names):
        with open_file(folder / name) as opened:
            keys = opened.keys()
        for key in keys:
            # Messages name tensors, and may not hold what a terminal acts on.
            if not key.isprintable():
                raise EzpzError(f"{folder / name}: {key!r} is not the name of a tensor.")
            # Whichever was read last would win, and the other may be the model's.
            if key in held:
                raise EzpzError(
                    f"{folder}: {key!r} is both in {held[key]} and in {name}. Move the file that "
                    "does not belong to the model to another folder."
                )
            held[key] = name
    return held


def read_config(folder: Path) -> dict[str, Any] | None:
    """Read ``config.json``; None if there is none.

    Raises:
        EzpzError: it cannot be read.
    """
    file = folder / CONFIG
    return _read_json(file, dict) if os.path.lexists(file) else None


def _read_index(file: Path) -> dict[str, str] | None:
    """Return the index's map from tensors to files; None if there is no index."""
    if not os.path.lexists(file):
        return None
    index = _read_json(file, _unique).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise EzpzError(f'{file}: has no "weight_map" from tensors to files.')
    for key, name in index.items():
        if not (isinstance(name, str) and is_below(name)):
            raise EzpzError(f"{file}: {key!r}: {name!r} is not a file in its folder.")
    absent = sorted({name for name in index.values() if not (file.parent / name).is_file()})
    if absent:
        raise EzpzError(
            f"{file.parent / absent[0]}: is missing, but {file.name} names it"
            + (f" ({len(absent)} of its files are missing)" if absent[1:] else "")
            + ". Was the whole model downloaded?"
        )
    return index


def _read_json(file: Path, made_of_pairs: Callable) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=made_of_pairs)
    except (OSError, ValueError, RecursionError) as error:
        raise EzpzError(f"{file}: cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise EzpzError(f"{file}: is not a JSON object.")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of an object's pairs; json itself takes the last of two with the same key."""
    made = dict(pairs)
    if len(made) < len(pairs):
        key = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"it has two values for {key!r}")
    return made


def read_tensors(
    folder: Path, files: Files, keys: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors ``keys`` from safetensors, file by file.

    Raises:
        EzpzError: one is quantized, or has another shape; a file cannot be read.
    """
    # A parameter of experts comes from many tensors: open each file once for all of them.
    for file in sorted({files[key] for key in keys}):
        with open_file(folder / file) as opened:
            for key, shape in keys.items():
                if files[key] == file:
                    tensor = opened.get_tensor(key)
                    # float8 is floating point too, but is useless without its scales.
                    if not tensor.is_floating_point() or tensor.itemsize < 2:
                        raise EzpzError(
                            f"{folder / file}: {key} is quantized ({tensor.dtype}). Convert the "
                            "model to bfloat16 first."
                        )
                    if tensor.shape != shape:
                        raise EzpzError(
                            f"{folder / file}: {key} has the shape {list(tensor.shape)}, but the "
                            f"flavor's model wants {list(shape)}."
                        )
                    yield key, tensor


def how_to_dequantize(config: str) -> str:
    """Return what to do with weights that ``config`` of transformers quantizes."""
    # The FP8 one does not begin without accelerate, even to dequantize.
    return (
        "Save the model in bfloat16 first, with transformers and accelerate: "
        f"AutoModelForCausalLM.from_pretrained(..., quantization_config={config}"
        "(dequantize=True)).save_pretrained(...)."
    )


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        EzpzError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:  # a folder or a broken link is an OSError
        raise EzpzError(f"{file}: cannot be read: {printable(str(error))}.") from error
