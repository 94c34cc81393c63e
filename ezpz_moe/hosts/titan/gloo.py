"""What gloo, which CPUs communicate with, lacks for ``parallelism.spmd_backend = "spmd_types"``.

Seen with torch 2.14.1 and torchtitan 0.3.0; under ``"partial_dtensor"`` the host runs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPMD = "parallelism.spmd_backend"
INSTEAD = "partial_dtensor"


def why_not_spmd_types(parallelism: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a setting, and why gloo cannot run the host's default with it; None if it can.

    Args:
        parallelism: key -> value of the host's section of that name; one that is absent has the
            host's default.
    """

    def number(key: str) -> int:
        return parallelism.get(key, 1)

    if (degree := number("expert_parallel_degree")) > 1:
        return (
            f"parallelism.expert_parallel_degree = {degree}",
            "gloo has no list form of all-to-all with unequal sizes",
        )
    is_split = number("tensor_parallel_degree") > 1 and number("pipeline_parallel_degree") > 1
    size = number("pipeline_parallel_microbatch_size")
    if is_split and size > 1 and parallelism.get("enable_sequence_parallel", True):
        return (
            f"parallelism.pipeline_parallel_microbatch_size = {size} with tensor parallelism",
            "a stage receives its part of several sequences in the layout in which it was cut out, "
            "and gloo takes contiguous tensors alone",
        )
    return None
