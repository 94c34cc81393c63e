"""What a contender has to provide to be measured.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ezpz_moe.compute.reference import Case
from ezpz_moe.tools.bench.shapes import Shape


class Prepared(NamedTuple):
    """A layer that is ready to run.

    Attributes:
        forward: computes y_RD from the inputs, under autograd.
        inputs: the weights and x, leaves that require a gradient.
        constants: further tensors that it needs: token counts, each row's expert.
    """

    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        name: in tables; a backend's is its spec, options included.
        prepare: gets it ready for a case, with weights in the layout it needs; this is not timed.
        why_not: ``(device, dtype, shape)`` -> every reason why it cannot run; empty means usable.
        declares_syncs: whether it says that it waits for the device; None if it says nothing.
        computes_layer: whether its output is the expert layer's, which is checked before timing.
        may_drop: whether it may leave rows out, which are then zero.
        is_backend: whether it is one of ours, or of a package that adds one.
    """

    name: str
    prepare: Callable[[Case], Prepared]
    why_not: Callable[[torch.device, torch.dtype, Shape], list[str]]
    declares_syncs: bool | None = None
    computes_layer: bool = True
    may_drop: bool = False
    is_backend: bool = False


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the same values and memory, as inputs that require a gradient."""
    # Not cloned: a second copy of the weights may not fit in memory.
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def prepared(swiglu: Callable[..., Tensor]) -> Callable[[Case], Prepared]:
    """Prepare a function that takes ``(w1, w2, w3, x, counts)``, as our backends do."""

    def prepare(case: Case) -> Prepared:
        inputs = leaves(case.w1_EFD, case.w2_EDF, case.w3_EFD, case.x_RD)
        counts_E = case.num_tokens_per_expert_E
        return Prepared(lambda: swiglu(*inputs, counts_E), inputs, (counts_E,))

    return prepare
