"""What a contender has to provide to be measured.

Legend of the suffixes: :mod:`ezpz_moe.compute.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ezpz_moe.compute.reference import Case
from ezpz_moe.errors import EzpzError, did_you_mean
from ezpz_moe.tools.bench.shapes import Shape


class Prepared(NamedTuple):
    """A layer that is ready to run.

    Attributes:
        forward: computes y_RD, or a routed layer's out_TD, from the inputs, under autograd.
        inputs: the weights and x, and last a routed layer's scores; leaves that require a gradient.
        constants: further tensors that it needs: token counts, the experts of rows or tokens.
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
            It takes a Case, or a RoutedCase if it computes routed layers.
        why_not: ``(device, dtype, shape)`` -> every reason why it cannot run; empty means usable.
        declares_syncs: whether it says that it waits for the device; None if it says nothing.
        computes_layer: whether its output is the expert layer's, which is checked before timing.
        may_drop: whether it may leave rows out, which are then zero.
        is_backend: whether it is one of ours, or of a package that adds one.
        any_ffn: whether it computes every activation, with biases too, and not SwiGLU alone.
    """

    name: str
    prepare: Callable[[Any], Prepared]
    why_not: Callable[[torch.device, torch.dtype, Shape], list[str]]
    declares_syncs: bool | None = None
    computes_layer: bool = True
    may_drop: bool = False
    is_backend: bool = False
    any_ffn: bool = False

    def reasons_against(self, device: torch.device, dtype: torch.dtype, shape: Shape) -> list[str]:
        """Return every reason why it cannot run, the layer's FFN included; empty means usable."""
        if not (self.any_ffn or shape.is_plain):
            return ["it computes SwiGLU without biases alone"]
        return self.why_not(device, dtype, shape)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the same values and memory, as inputs that require a gradient."""
    # Not cloned: a second copy of the weights may not fit in memory.
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def prepared(ffn: Callable[..., Tensor]) -> Callable[[Case], Prepared]:
    """Prepare a function that takes what :meth:`.Backend.ffn` does."""

    def prepare(case: Case) -> Prepared:
        inputs = leaves(*case.inputs)
        return Prepared(lambda: case.apply(ffn, *inputs), inputs, (case.num_tokens_per_expert_E,))

    return prepare


def named(names: Sequence[str], known: Mapping[str, Contender]) -> list[Contender]:
    """Return the contenders that ``--against`` names.

    Raises:
        EzpzError: there is no such contender.
    """
    for name in names:
        if name not in known:
            raise EzpzError(
                f"--against {name!r}: no such contender. Known: {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )
    return [known[name] for name in names]
