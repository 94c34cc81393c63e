"""The classes that a checkpoint's metadata is made of. Nothing here imports torch.

They are torch's own where tensors are read too (:mod:`.torch_kinds`), and stand-ins where the
metadata is all that is asked for (:mod:`.stand_ins`): importing torch takes longer than reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

Known = Callable[[str, str], Any]
"""Return what a pickle may name, given module and name; None for all else."""

DCP = "torch.distributed.checkpoint"

PATHS: dict[tuple[str, str], Any] = {
    # Where it was saved, possibly on another system; Python 3.13 has a module of its own for it.
    (module, f"{pure}{kind.__name__.removeprefix('Pure')}"): kind
    for module in ("pathlib", "pathlib._local")
    for pure in ("", "Pure")
    for kind in (PurePosixPath, PureWindowsPath)
}


@dataclass(frozen=True)
class Kinds:
    """The classes of what has been read.

    Attributes:
        metadata: of the whole checkpoint.
        tensor, bytes: of an entry that is a tensor, or a pickled object.
        chunk: of a shard's offsets and sizes.
        index: of an entry's or a shard's name.
        place: of where it is stored.
        size, dtype: of a tensor.
        known: finds these and the other classes of metadata by the names that pickles give them.
    """

    metadata: type[Any]
    tensor: type[Any]
    bytes: type[Any]
    chunk: type[Any]
    index: type[Any]
    place: type[Any]
    size: type[Any]
    dtype: type[Any]
    known: Known
