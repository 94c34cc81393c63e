"""Which tile sizes the Triton kernels are timed with, and when.

A kernel is timed once for each inner and outer dimension, number of experts, dtype, layout and
*bucket* of rows (the next power of two, because R itself changes from step to step). Timings are
kept on disk next to Triton's compiled kernels, by device and Triton version. Small products are not
worth it: they get one configuration. Timing waits for the device; later calls do not.

Which sizes are tried depends on the GPU, because a tile that needs more registers than there are
keeps some of it in memory, and is slow. ``benchmarks/triton_tiles.py`` compiles every choice for
four kinds of GPU: none of them spills, and each fits into shared memory.

If torch's deterministic algorithms are on, nothing is timed and nothing kept counts, because
another size of a tile sums in another order: the smallest tiles compute.
"""

import warnings
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

WORTH_TIMING = 2**32  # multiply-adds of one launch: some 10 us on a large GPU


def _config(
    rows: int, columns: int, terms: int, stages: int, warps: int, group: int = 8
) -> triton.Config:
    blocks = {"BLOCK_R": rows, "BLOCK_N": columns, "BLOCK_K": terms, "GROUP": group}
    return triton.Config(blocks, num_stages=stages, num_warps=warps)


SMALL = _config(32, 32, 32, 2, 4)
_INTERPRETED = _config(16, 32, 16, 1, 1, group=2)  # several tiles even at the tests' small sizes

# By kernel, the largest tiles first. gate_and_up has two sums in registers, and so half as many
# columns; hidden_gradients needs registers for derivatives beside its sum.
_HALF = {
    "multiply": [
        _config(128, 128, 64, 4, 8),
        _config(64, 128, 64, 4, 4),
        _config(32, 128, 64, 4, 4),
    ],
    "gate_and_up": [
        _config(128, 64, 64, 3, 8),
        _config(64, 128, 64, 3, 8),
        _config(64, 64, 64, 4, 4),
        _config(32, 64, 64, 4, 4),
    ],
    "hidden_gradients": [
        _config(128, 128, 64, 4, 8),
        _config(64, 256, 64, 3, 8),
        _config(64, 128, 64, 4, 4),
        _config(32, 128, 64, 4, 4),
    ],
    "weight_gradient": [
        _config(128, 256, 64, 3, 8),
        _config(128, 128, 64, 4, 8),
        _config(128, 128, 64, 3, 4),
        _config(64, 128, 64, 4, 4),
        _config(32, 128, 64, 4, 4),
    ],
}
# NVIDIA's products read operands from registers before SM90, and from shared memory since.
_HALF_NOT_BEFORE_SM90 = {
    "multiply": [_config(128, 256, 64, 3, 8), _config(128, 128, 64, 3, 4)],
    "gate_and_up": [_config(128, 128, 64, 3, 8), _config(128, 64, 64, 3, 4)],
}
# Four bytes per element fill shared memory and registers twice as fast, so tiles are smaller.
_FLOAT32 = {
    "multiply": [_config(128, 64, 16, 3, 8), _config(64, 64, 32, 3, 4), _config(32, 64, 32, 3, 4)],
    "gate_and_up": [
        _config(128, 64, 16, 3, 8),
        _config(64, 64, 16, 3, 4),
        _config(32, 64, 32, 3, 4),
    ],
    "hidden_gradients": [
        _config(128, 64, 16, 3, 8),
        _config(64, 64, 32, 3, 4),
        _config(32, 64, 32, 3, 4),
    ],
    "weight_gradient": [_config(64, 64, 32, 3, 4), _config(32, 64, 32, 3, 4)],
}

NARROWEST = min(
    config.kwargs["BLOCK_N"]
    for configs in ([SMALL, _INTERPRETED], *_HALF.values(), *_FLOAT32.values())
    for config in configs
)
"""Columns of the narrowest tile; those of every other are a multiple."""


def choices(kernel: str, dtype: torch.dtype, gpu: GPUTarget) -> list[triton.Config]:
    """Return the sizes worth timing for a kernel, by its name, the largest tiles first."""
    if dtype == torch.float32:
        found = _FLOAT32[kernel]
    elif gpu.backend == "cuda" and gpu.arch < 90:
        found = _HALF[kernel]
    else:
        found = _HALF_NOT_BEFORE_SM90.get(kernel, []) + _HALF[kernel]
    return [_with_two_stages(each) for each in found] if gpu.backend == "hip" else found


def _with_two_stages(config: triton.Config) -> triton.Config:
    # AMD's GPUs have 64 KiB of shared memory, and load the next tile into registers.
    return triton.Config(config.kwargs, num_stages=2, num_warps=config.num_warps)


def _to_time(
    configs: list[triton.Config], arguments: dict[str, Any], *, kernel: str, **constants: Any
) -> list[triton.Config]:
    """Return the configurations for the dtype and the GPU; or a single one, which is not timed."""
    if arguments["R_BUCKET"] * arguments["K"] * arguments["N"] < WORTH_TIMING:
        return [SMALL]
    dtype = next(value.dtype for value in arguments.values() if isinstance(value, torch.Tensor))
    candidates = choices(kernel, dtype, triton.runtime.driver.active.get_current_target())
    if torch.are_deterministic_algorithms_enabled():
        return candidates[-1:]  # the smallest
    # Timing waits for the device, which a capture does not allow.
    if not torch.cuda.is_current_stream_capturing():
        return candidates
    warnings.warn(
        "a CUDA graph is capturing an expert layer of new sizes, and its Triton kernels cannot be "
        "tuned meanwhile: compute the layer once before capturing",
        stacklevel=2,
    )
    return candidates[:1]


def tuned(kernel: Any) -> Any:
    """Return the kernel with BLOCK_R, BLOCK_N, BLOCK_K, GROUP and EVEN_K filled in."""
    sizes = partial(_to_time, kernel=kernel.__name__)
    configs = [SMALL, *_HALF[kernel.__name__]]  # several, or Triton would not ask which
    if "EVEN_K" in kernel.arg_names:
        even = triton.heuristics({"EVEN_K": lambda given: given["K"] % given["BLOCK_K"] == 0})
        kernel = even(kernel)
    # These strides tell weights from their transposed view: a tile is then read in another order,
    # and another size may be best. And without a gate gate_and_up has half as much to do.
    layout = {"SECOND", "GATED", "TOP_K", "b_n", "w1_k", "w2_n", "g_n"} & set(kernel.arg_names)
    return triton.autotune(
        [_INTERPRETED] if triton.knobs.runtime.interpret else configs,
        key=["E", "K", "N", "R_BUCKET", *sorted(layout)],
        prune_configs_by={"early_config_prune": sizes},
        cache_results=True,
    )(kernel)
