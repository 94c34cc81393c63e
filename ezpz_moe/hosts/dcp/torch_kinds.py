"""The classes of DCP's metadata as the installed torch has them."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp

from ezpz_moe.hosts.dcp.kinds import PATHS, Kinds


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise ValueError(f"unknown layout {name!r}")
    return torch.strided


class _Properties(dcp.TensorProperties):
    """The properties of a tensor that any torch has saved, as the installed torch has them."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # Our class would otherwise be named in what remap writes, and the host does not have it.
        self.__class__ = dcp.TensorProperties
        try:
            self.__setstate__(state)
        except ValueError:
            # Since 2.15 torch adds the strides, for which 2.14 has no place. Nothing reads them.
            self.__setstate__(state[:5])


_CLASSES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): torch.Size,
    # Which torch does by looking for an attribute of itself.
    ("torch.serialization", "_get_layout"): _layout,
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    **{
        (dcp.__name__, each.__name__): each
        for each in (
            dcp.BytesStorageMetadata,
            dcp.ChunkStorageMetadata,
            dcp.Metadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp.TensorStorageMetadata,
            dcp._MEM_FORMAT_ENCODING,
        )
    },
    (dcp.__name__, dcp.TensorProperties.__name__): _Properties,
    **PATHS,
}


def _known(module: str, name: str) -> Any:
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    return _CLASSES.get((module, name))


TORCH = Kinds(
    metadata=dcp.Metadata,
    tensor=dcp.TensorStorageMetadata,
    bytes=dcp.BytesStorageMetadata,
    chunk=dcp.ChunkStorageMetadata,
    index=dcp.MetadataIndex,
    place=filesystem._StorageInfo,
    size=torch.Size,
    dtype=torch.dtype,
    known=_known,
)
