"""The dense model's tensors, one at a time, under the host's names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from ezpz_moe.errors import EzpzError, some
from ezpz_moe.hosts.architecture import Architecture
from ezpz_moe.hosts.dcp.paths import find_checkpoint
from ezpz_moe.hosts.upcycling_target import Target
from ezpz_moe.tools.checkpoints import contents, names, storage
from ezpz_moe.tools.checkpoints.data_files import check_data
from ezpz_moe.tools.checkpoints.huggingface.config import dense_classes
from ezpz_moe.tools.checkpoints.huggingface.differences import check_config
from ezpz_moe.tools.checkpoints.huggingface.files import (
    how_to_dequantize,
    open_file,
    read_config,
    read_tensors,
    weight_map,
)
from ezpz_moe.tools.checkpoints.huggingface.tied import find_tied, tied_notes
from ezpz_moe.tools.checkpoints.tensors import read_whole


class Dense(Protocol):
    """A dense model on the disk.

    Attributes:
        folder: where it is.
        itemsize: bytes of its widest number type.
        notes: what the user should know about it.
    """

    folder: Path
    itemsize: int
    notes: tuple[str, ...]

    def shape(self, name: str) -> torch.Size | None:
        """Return the shape of a tensor; None if there is no tensor of that name."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the number type of a tensor that it has."""

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor."""

    def left_over(self, used: Iterable[str]) -> list[str]:
        """Return the names that it has besides ``used``."""


class DenseCheckpoint:
    """A dense model in a DCP checkpoint.

    Raises:
        EzpzError: it is missing, incomplete, of another generation, or not dense.
    """

    def __init__(self, path: Path, target: Target) -> None:
        self.folder = find_checkpoint(path)
        self._metadata = storage.read_metadata(self.folder)
        check_data(self.folder, self._metadata)
        self._entries = dict(contents.model_tensors(self._metadata))
        if names.generation_of(self._entries) == names.TITAN_0_2 != target.generation:
            raise EzpzError(
                f"{self.folder}: has the names of torchtitan {names.TITAN_0_2}. First run: "
                f"ezpz-moe ckpt remap {self.folder} DIR --to {target.generation}"
            )
        if any(".moe." in name for name in self._entries):
            raise EzpzError(
                f"{self.folder}: is already a mixture of experts; upcycle needs a dense model."
            )
        sizes = (each.properties.dtype.itemsize for each in self._entries.values())
        self.itemsize = max(sizes, default=0)
        self.notes: tuple[str, ...] = ()

    def shape(self, name: str) -> torch.Size | None:
        # The host saves a tied tensor under both of its names.
        return self._entries[name].size if name in self._entries else None

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._entries[name].properties.dtype
        return dtype

    def read(self, name: str) -> torch.Tensor:
        return read_whole(self.folder, self._metadata, name)

    def left_over(self, used: Iterable[str]) -> list[str]:
        return sorted(self._entries.keys() - set(used))


class DenseSafetensors:
    """A dense model in Hugging Face's safetensors, through the host's adapter for the flavor.

    Args:
        architecture: what the flavor's model computes.

    Raises:
        EzpzError: the files cannot be read; or ``config.json`` describes a model that computes
            something else than the flavor's does without its experts.
    """

    def __init__(
        self, folder: Path, target: Target, adapter: Any, architecture: Architecture
    ) -> None:
        self.folder = folder
        self._target, self._adapter = target, adapter
        self._files = weight_map(folder)
        compared = _check_config(folder, target, architecture)
        self._tied = find_tied(folder, self._files)
        self.notes = (*compared, *tied_notes(self._tied))
        self._keys: dict[str, str] = {}
        # An upper bound for the disk's check: the dtypes are known only once every file is open.
        self.itemsize = torch.float32.itemsize

    def shape(self, name: str) -> torch.Size | None:
        if (key := self._key(name)) is None:
            return None
        # On the meta device: the adapter may transpose or split, and no data is read for a shape.
        meta = torch.empty(self._size(self._stored(key)), device="meta")
        return self._adapter.from_hf({key: meta})[name].shape

    def dtype(self, name: str) -> torch.dtype:
        # safetensors maps its file: this takes no data from the disk unless the adapter does.
        return self.read(name).dtype

    def read(self, name: str) -> torch.Tensor:
        key = self._key(name)
        assert key is not None
        stored = self._stored(key)
        ((_, tensor),) = read_tensors(self.folder, self._files, {stored: self._size(stored)})
        return self._adapter.from_hf({key: tensor})[name].contiguous()

    def left_over(self, used: Iterable[str]) -> list[str]:
        keys = {self._keys[name] for name in used if name in self._keys}
        return sorted(key for key in self._files.keys() - keys if self._is_parameter(key))

    def _stored(self, key: str) -> str:
        """Return the tensor that stands for ``key``: itself, unless it is tied to another."""
        return self._tied.get(key, key)

    def _size(self, stored: str) -> torch.Size:
        with open_file(self.folder / self._files[stored]) as file:
            return torch.Size(file.get_slice(stored).get_shape())

    def _key(self, name: str) -> str | None:
        """Return what the safetensors call ``name``; every dense parameter is one tensor."""
        if name not in self._keys:
            # For names that the flavor's model lacks, the dense FFN's, the adapter needs no shape.
            value = self._target.tensors.get(name, torch.empty((1, 1), device="meta"))
            found = [
                key
                for key in self._adapter.to_hf({name: value})
                if self._stored(key) in self._files
            ]
            if len(found) != 1:
                return None
            self._keys[name] = found[0]
        return self._keys[name]

    def _is_parameter(self, key: str) -> bool:
        """Return whether the host has a parameter for it: it computes rotary frequencies itself."""
        try:
            return bool(self._adapter.from_hf({key: torch.empty((1, 1), device="meta")}))
        except (AttributeError, LookupError, TypeError, ValueError):
            # The adapter asks of no name whether it knows its form. One that it does not know
            # counts as a parameter: it is then refused as left over, and not lost in silence.
            return True


def _check_config(folder: Path, target: Target, architecture: Architecture) -> list[str]:
    """Call :func:`check_config` with the class that ``config.json`` names, of those that fit."""
    said = (read_config(folder) or {}).get("model_type")
    forms = dense_classes(architecture)
    form = next((each for each in forms if each.config["model_type"] == said), forms[0])
    return check_config(folder, form, f"a dense model for flavor {target.flavor.name}")


def check_left_over(dense: Dense, used: Iterable[str], flavor: str) -> None:
    """Refuse a dense model if something of it would be lost.

    Raises:
        EzpzError: the flavor's model has no place for one of its tensors, or they are quantized.
    """
    lost = dense.left_over(used)
    if scales := [key for key in lost if key.endswith("_scale_inv")]:
        raise EzpzError(
            f"{dense.folder}: {scales[0].removesuffix('_scale_inv')} is quantized (FP8). "
            f"{how_to_dequantize('FineGrainedFP8Config')}"
        )
    if lost:
        raise EzpzError(
            f"{dense.folder}: has {some(lost)}, for which flavor {flavor} has no place. Is the "
            "flavor of the same family, with the same number of layers?"
        )
