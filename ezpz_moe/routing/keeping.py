"""Keep the routing of whole steps, token by token, also from within a compiled model.

Legend of the suffixes: :mod:`ezpz_moe.routing`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ezpz_moe.config.telemetry_schema import Kept
from ezpz_moe.routing.counters import is_recomputation

Microbatch = Mapping[str, Tensor]
"""``ids`` [T, K] int16, ``probabilities`` [T, E] float32 and ``mask`` [T] bool, all on the CPU."""

_kept: dict[int, list[Microbatch]] = {}
"""By layer, what :func:`keep` has kept since :func:`begin`."""
_asked_for: set[str] = set()
"""What of it; empty between the steps that are kept."""


def begin(what: tuple[Kept, ...]) -> None:
    """Keep ``what`` of every microbatch from now on, of all layers of this process."""
    _kept.clear()
    _asked_for.update(what, ("mask",))


def end() -> dict[int, list[Microbatch]]:
    """Return each layer's microbatches since :func:`begin`, in their order, and keep no more."""
    kept = dict(_kept)
    _kept.clear()
    _asked_for.clear()
    return kept


# An operator, because a compiler would neither leave a list alone nor ask each time whether this
# step is kept.
@torch.library.custom_op("ezpz_moe::keep", mutates_args=("kept_2",))
def keep(kept_2: Tensor, ids_TK: Tensor, p_TE: Tensor, mask_T: Tensor) -> None:
    """Keep a microbatch's routing if its step is kept, unless this is a recomputation.

    Device syncs: a few while a step is kept, otherwise none.

    Args:
        kept_2: int64, a buffer: the layer's number, and the microbatches that it has kept. As a
            plain number, it would have each layer compiled on its own.
        ids_TK: the experts that the tokens go to, any integer dtype, below 2**15.
        p_TE: their probabilities of all experts; zeros for padding.
        mask_T: bool, False for padding.
    """
    if not _asked_for or is_recomputation():
        return
    values = {
        "ids": (ids_TK, torch.int16),
        "probabilities": (p_TE, torch.float32),
        "mask": (mask_T, torch.bool),
    }
    # Copies on the CPU too, where the model may write to its own tensors again.
    microbatch = {
        name: value.to("cpu", dtype, copy=True)
        for name, (value, dtype) in values.items()
        if name in _asked_for
    }
    layer, count = kept_2.tolist()
    microbatches = _kept.setdefault(layer, [])
    # A pipeline tries a forward to learn its shapes, and then puts the buffers back: what that kept
    # is beyond the count.
    del microbatches[count:]
    microbatches.append(microbatch)
    kept_2[1] += 1
