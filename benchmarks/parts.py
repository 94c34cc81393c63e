"""Where the time of an expert layer goes here: its passes, products and elementwise parts.

    python benchmarks/parts.py
    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 python benchmarks/parts.py

The second form keeps memory once it has it, as ``ezpz-moe bench --allocator retain``. OLMoE/4,
balanced, bfloat16; medians of turns, each of which begins with another part. The table is in
docs/internals/backends.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import medians

from ezpz_moe.cli import display
from ezpz_moe.compute import get_backend
from ezpz_moe.compute.reference import random_case

E, D, HIDDEN, R = 64, 512, 256, 8192


def parts() -> dict[str, Callable[[], object]]:
    """By name what is timed."""
    counts = [R // E] * E
    case = random_case(counts, dim=D, hidden_dim=HIDDEN, dtype=torch.bfloat16)
    x_RD, counts_E = case.x_RD, case.num_tokens_per_expert_E
    inputs = (*case.parameters, x_RD, counts_E, None)  # every expert learns
    offs_E = torch.cumsum(counts_E, 0).int()
    w1_EDF = case.w1_EFD.transpose(1, 2)
    found: dict[str, Callable[[], object]] = {}
    for name in ("for_loop", "grouped_mm_fused"):
        compute = get_backend(name).compute
        _, gate_RF, up_RF = compute("ffn", *inputs, case.activation)
        found[f"{name}, forward"] = partial(compute, "ffn", *inputs, case.activation)
        found[f"{name}, backward"] = partial(
            compute, "ffn_backward", case.grad_y_RD, *inputs, gate_RF, up_RF, case.activation
        )
    loop = get_backend("for_loop").compute
    found["product, for_loop"] = partial(loop, "mm", x_RD, w1_EDF, offs_E)
    found["product, torch._grouped_mm"] = partial(torch._grouped_mm, x_RD, w1_EDF, offs=offs_E)
    found["product, torch.bmm"] = partial(torch.bmm, x_RD.view(E, -1, D), w1_EDF)
    out_RF = torch.empty_like(gate_RF)
    found["silu"] = partial(F.silu, gate_RF)
    found["product of two [R, F]"] = partial(torch.mul, gate_RF, up_RF)
    found["the same into one there is"] = partial(torch.mul, gate_RF, up_RF, out=out_RF)
    found["silu's derivative"] = partial(_silu_backward, gate_RF, up_RF, out_RF)
    return found


def _silu_backward(grad_RF: Tensor, gate_RF: Tensor, out_RF: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(grad_RF, gate_RF, grad_input=out_RF)


def main() -> None:
    rows = ({"part": name, "ms": f"{ms:.2f}"} for name, ms in medians(parts()).items())
    display.print_table(rows, title=f"E={E} D={D} F={HIDDEN} R={R}, bfloat16")


if __name__ == "__main__":
    main()
