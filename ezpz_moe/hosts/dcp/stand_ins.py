"""The metadata of a checkpoint read without torch, in plain classes with the same attributes.

A checkpoint that is as usual is read here. Of any other, damaged ones included, only torch can say
what is wrong with it, so that no answer depends on which of the two reads.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ezpz_moe.hosts.dcp.kinds import DCP, PATHS, Kinds
from ezpz_moe.hosts.dcp.paths import METADATA
from ezpz_moe.hosts.dcp.structure import check_structure
from ezpz_moe.hosts.dcp.unpickling import load_metadata

_ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of a number, by the dtype's name in torch: what models and optimizers are saved in."""

_LARGEST = 2**63 - 1  # of what torch counts in a tensor


def read_metadata(folder: Path) -> Metadata | None:
    """Read the metadata of the checkpoint in ``folder``; None if torch has to.

    Nothing that it names is run, as in :func:`.metadata.read_metadata`.
    """
    try:
        metadata = load_metadata((folder / METADATA).read_bytes(), STAND_INS)
        check_structure(metadata, STAND_INS)
    except Exception:  # a damaged pickle may raise anything; torch's reading says what is wrong
        return None
    return metadata


class Size(tuple):
    """In place of ``torch.Size``, which holds whole numbers only."""

    __slots__ = ()

    def __new__(cls, values: tuple[int, ...] = ()) -> Size:
        size = super().__new__(cls, values)
        if not all(type(each) is int for each in size) or math.prod(size) > _LARGEST:
            raise ValueError("is no size")
        return size

    def numel(self) -> int:
        """Return how many numbers a tensor of this size has."""
        return math.prod(self)


@dataclass(frozen=True)
class DType:
    """In place of ``torch.dtype``."""

    name: str
    itemsize: int

    def __str__(self) -> str:
        return f"torch.{self.name}"


class MemoryFormat(enum.Enum):
    """In place of ``_MEM_FORMAT_ENCODING``."""

    CONTIGUOUS, CHANNELS_LAST, PRESERVE = range(3)


class Properties:
    """In place of ``TensorProperties``: of these, the dtype alone is asked for."""

    dtype: DType

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype, _, _, memory_format, *more = state
        # Whether memory was pinned and, since torch 2.15, the strides.
        if not isinstance(memory_format, MemoryFormat) or len(more) not in (1, 2):
            raise ValueError("are no properties of a tensor")


@dataclass
class Chunk:
    """In place of ``ChunkStorageMetadata``."""

    offsets: Size
    sizes: Size


@dataclass
class Tensor:
    """In place of ``TensorStorageMetadata``."""

    properties: Properties
    size: Size
    chunks: list[Chunk]


@dataclass
class Bytes:
    """In place of ``BytesStorageMetadata``."""


@dataclass(frozen=True)
class Index:
    """In place of ``MetadataIndex``. ``index`` is a hint where to look, and part of no name."""

    fqn: str
    offset: Size | None = None
    index: int | None = field(hash=False, compare=False, default=None)


@dataclass
class Place:
    """In place of ``_StorageInfo``."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: list[str] | None = None


@dataclass
class StorageMeta:
    """In place of ``StorageMeta``, of which nothing is asked."""


@dataclass
class Metadata:
    """In place of ``Metadata``."""

    state_dict_metadata: dict[str, Tensor | Bytes]
    planner_data: Any = None
    storage_data: Any = None


def _layout(name: str) -> str:
    if name != "torch.strided":
        raise ValueError("is an unknown layout")
    return name


_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): Size,
    ("torch.serialization", "_get_layout"): _layout,
    (f"{DCP}.filesystem", "_StorageInfo"): Place,
    (f"{DCP}.metadata", "BytesStorageMetadata"): Bytes,
    (f"{DCP}.metadata", "ChunkStorageMetadata"): Chunk,
    (f"{DCP}.metadata", "Metadata"): Metadata,
    (f"{DCP}.metadata", "MetadataIndex"): Index,
    (f"{DCP}.metadata", "StorageMeta"): StorageMeta,
    (f"{DCP}.metadata", "TensorProperties"): Properties,
    (f"{DCP}.metadata", "TensorStorageMetadata"): Tensor,
    (f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"): MemoryFormat,
    **{("torch", name): DType(name, size) for name, size in _ITEM_SIZES.items()},
    **PATHS,
}

STAND_INS = Kinds(
    metadata=Metadata,
    tensor=Tensor,
    bytes=Bytes,
    chunk=Chunk,
    index=Index,
    place=Place,
    size=Size,
    dtype=DType,
    known=lambda module, name: _CLASSES.get((module, name)),
)
