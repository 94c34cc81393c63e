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


def wrapper_of(weight: Tensor) -> str | None:
    """Return the class of what ``weight`` is wrapped in, or None for a plain tensor.

    What shards a tensor among ranks does not count; what it holds does.
    """
    with torch.no_grad():
        kind = type(local(weight))
    # A fake tensor stands for a plain one, in a run that computes nothing.
    return kind.__name__ if kind is not FakeTensor and _computes(kind) else None


def _computes(kind: type[Tensor]) -> bool:
    """Return whether tensors of this class compute in another way than a plain one.

    A class may be there for its attributes or its name alone.
    """
    is_plain = _function_of(kind) in (_function_of(Tensor), _function_of(nn.Parameter))
    return not is_plain or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


def _function_of(kind: type[Tensor]) -> object:
    # Bound to the class that is asked, so compare what is below.
    return getattr(kind.__torch_function__, "__func__", kind.__torch_function__)


def wrapper_in(module: nn.Module) -> str | None:
    """Return the class of the first wrapped parameter in ``module`` or below, or None."""
    return next(filter(None, map(wrapper_of, module.parameters())), None)
