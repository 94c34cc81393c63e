"""Hugging Face's safetensors on a disk: which file holds a tensor, and reading it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ezpz_moe.errors import EzpzError


def weight_map(folder: Path) -> dict[str, str]:
    """Map each tensor's name to the file that holds it.

    Raises:
        EzpzError: there is no such file, or one cannot be read.
    """
    files: dict[str, str] = {}
    # From the files, not from the index: a model in one file has none, and an index may be stale.
    for file in sorted(folder.glob("*.safetensors")):
        with open_file(file) as opened:
            files |= dict.fromkeys(opened.keys(), file.name)
    if not files:
        raise EzpzError(f"{folder}: holds no safetensors.")
    return files


def read_tensors(
    folder: Path, files: Mapping[str, str], keys: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the tensors ``keys`` from safetensors, file by file.

    Raises:
        EzpzError: one is quantized, or has another number of elements; a file cannot be read.
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
                            f"{folder / file}: {key} is quantized ({tensor.dtype}). The trainer "
                            "reads such weights with their scales: --checkpoint.initial_load_in_hf "
                            "--checkpoint.initial_load_in_hf_quantized "
                            f"--checkpoint.initial_load_path {folder.absolute()}"
                        )
                    if math.prod(tensor.shape) != math.prod(shape):
                        raise EzpzError(
                            f"{folder / file}: {key} has the shape {list(tensor.shape)}, but the "
                            f"flavor's model wants {list(shape)}."
                        )
                    yield key, tensor


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        EzpzError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise EzpzError(f"{file}: cannot be read: {error}.") from error
