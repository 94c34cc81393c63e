"""Get a rank's own part of a sharded tensor."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of ``tensor``; all of it for a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
