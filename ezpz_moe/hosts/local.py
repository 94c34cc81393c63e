"""A rank's own part of a tensor that is shared out."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``; all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
