"""Expert kernels: pure tensor code that imports torch and never a trainer.

Ways to compute the routed experts of a Mixture-of-Experts layer, with one signature::

    y_RD = for_loop(w1_EFD, w2_EDF, w3_EFD, x_RD, num_tokens_per_expert_E)

:mod:`.contract` says what every backend promises, :mod:`.registry` finds them by name,
:mod:`.backends` holds one file for each, :mod:`.reference` the float64 truth that they are
measured against.
"""

from ezpz_moe.compute.backends import batched_mm_capacity as _batched_mm_capacity
from ezpz_moe.compute.backends import batched_mm_padded as _batched_mm_padded
from ezpz_moe.compute.backends import for_loop as _for_loop
from ezpz_moe.compute.backends import grouped_mm as _grouped_mm
from ezpz_moe.compute.contract import Backend
from ezpz_moe.compute.registry import backend_names, get_backend

for_loop = _for_loop.BACKEND.swiglu
grouped_mm = _grouped_mm.BACKEND.swiglu
batched_mm_capacity = _batched_mm_capacity.BACKEND.swiglu
batched_mm_padded = _batched_mm_padded.BACKEND.swiglu

__all__ = [
    "Backend",
    "backend_names",
    "batched_mm_capacity",
    "batched_mm_padded",
    "for_loop",
    "get_backend",
    "grouped_mm",
]
