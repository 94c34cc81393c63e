"""The dtypes in which a device multiplies matrices natively: torch tells, never a CPU's name.

A CPU without bfloat16 instructions (AVX2: most laptops, many servers) still accepts bfloat16, but
torch multiplies it there 10 to 40 times slower than float32. So the kernels multiply in float32
there (:mod:`.products`), and jobs train in float32 unless they say otherwise (the host bindings).
Accelerators are not asked: they refuse what they cannot multiply, and ``why_not`` says so.
"""

import os
from functools import cache

import torch

from ezpz_moe.errors import EzpzError

VARIABLE = "EZPZ_MOE_NATIVE_DTYPES"
"""Overrides what torch says about the CPU: "float32" or "float32,bfloat16,float16"."""

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes that a CPU may lack; it always has float32 and float64."""


@cache
def native_halves() -> frozenset[torch.dtype]:
    """Return which of :data:`HALVES` this machine's CPU multiplies natively.

    Cached, because kernels ask at every product: a test that sets :data:`VARIABLE` must call
    ``native_halves.cache_clear()``.

    Raises:
        EzpzError: :data:`VARIABLE` names something other than dtypes.
    """
    if (named := os.environ.get(VARIABLE)) is not None:
        return _named(named)
    # A torch built without oneDNN lacks these questions, and has no such products either.
    questions = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    # Below, bool() answers False for a torch that does not know the question.
    available = torch.backends.mkldnn.is_available()
    return frozenset(
        dtype
        for dtype, question in questions.items()
        if available and getattr(torch.ops.mkldnn, question, bool)()
    )


def is_emulated(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Return whether ``device`` computes products in ``dtype`` without instructions for it."""
    return dtype in HALVES and torch.device(device).type == "cpu" and dtype not in native_halves()


def emulation_note(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return one line for the user if ``dtype`` is slow on ``device``, else None."""
    if not is_emulated(device, dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name} is emulated on this CPU: torch multiplies it 10 to 40 times slower than float32. "
        f"Backends other than grouped_mm multiply in float32 and round to {name}"
    )


def _named(names: str) -> frozenset[torch.dtype]:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    chosen = [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        raise EzpzError(
            f"{VARIABLE} = {names!r}: {unknown[0]!r} is not a dtype that a CPU may multiply. "
            f"Write some of {', '.join(known)}, separated by commas."
        )
    return frozenset(known[name] for name in chosen) & frozenset(HALVES)
