"""Tell whether weights are plain tensors, which a backend multiplies as it finds them.

Quantization may wrap weights instead of changing the class that holds them: their
``__torch_function__`` or ``__torch_dispatch__`` then computes ``torch._grouped_mm`` in another
precision. A backend that multiplies in its own way never asks them, and would train without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ezpz_moe.hosts.local import local

# A fake tensor stands for a plain one, in a run that computes nothing.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def wrapper_of(weight: Tensor) -> str | None:
    """Return the class of what ``weight`` is wrapped in, or None for a plain tensor.

    What shards a tensor among ranks does not count; what it holds does.
    """
    with torch.no_grad():
        kind = type(local(weight))
    return None if kind in _PLAIN else kind.__name__


def wrapper_in(module: nn.Module) -> str | None:
    """Return the class of the first wrapped parameter in ``module`` or below, or None."""
    return next(filter(None, map(wrapper_of, module.parameters())), None)
