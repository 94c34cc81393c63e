"""Which tile sizes the Triton kernels are timed with, and when.

A kernel is timed once for each inner and outer dimension, number of experts, dtype, layout and
*bucket* of rows (the next power of two, because R itself changes from step to step). Timings are
kept on disk next to Triton's compiled kernels, by device and Triton version. Small products are not
worth it: they get one configuration. Timing waits for the device; later calls do not.

If torch's deterministic algorithms are on, nothing is timed and nothing kept counts, because
another size of a tile sums in another order: the smallest tiles compute.
"""

import warnings
from typing import Any

import torch
import triton

WORTH_TIMING = 2**32  # multiply-adds of one launch: some 10 us on a large GPU


def _config(
    rows: int, columns: int, terms: int, stages: int, warps: int, group: int = 8
) -> triton.Config:
    blocks = {"BLOCK_R": rows, "BLOCK_N": columns, "BLOCK_K": terms, "GROUP": group}
    return triton.Config(blocks, num_stages=stages, num_warps=warps)


_SMALL = _config(32, 32, 32, 2, 4)
_INTERPRETED = _config(16, 32, 16, 1, 1, group=2)  # several tiles even at the tests' small sizes
_ONE_SUM = [
    _config(128, 256, 64, 3, 8),
    _config(128, 128, 64, 4, 8),
    _config(128, 128, 64, 3, 4),
    _config(64, 128, 64, 4, 4),
    _config(32, 128, 64, 4, 4),
]
_TWO_SUMS = [  # the same number of registers for sums, and half the columns
    _config(128, 128, 64, 3, 8),
    _config(128, 64, 64, 3, 4),
    _config(64, 128, 64, 3, 8),
    _config(64, 64, 64, 4, 4),
    _config(32, 64, 64, 4, 4),
]
# Four bytes per element fill shared memory twice as fast, so tiles are smaller.
_FLOAT32 = [
    _config(128, 64, 16, 3, 8),
    _config(64, 64, 32, 3, 4),
    _config(32, 64, 32, 3, 4),
]

NARROWEST = min(
    config.kwargs["BLOCK_N"]
    for config in (_SMALL, _INTERPRETED, *_ONE_SUM, *_TWO_SUMS, *_FLOAT32)
)
"""Columns of the narrowest tile; those of every other are a multiple."""


def _to_time(
    configs: list[triton.Config], arguments: dict[str, Any], **constants: Any
) -> list[triton.Config]:
    """Return the configurations for the dtype; or a single one, which is then not timed."""
    if arguments["R_BUCKET"] * arguments["K"] * arguments["N"] < WORTH_TIMING:
        return [_SMALL]
    dtype = next(value.dtype for value in arguments.values() if isinstance(value, torch.Tensor))
    of_dtype = [config for config in configs if (config in _FLOAT32) == (dtype == torch.float32)]
    candidates = [config for config in of_dtype if config is not _SMALL]
    if torch.are_deterministic_algorithms_enabled():
        return candidates[-1:]  # the smallest tiles fit wherever any of them does
    # Timing waits for the device, which a capture does not allow.
    if not torch.cuda.is_current_stream_capturing():
        return candidates
    warnings.warn(
        "a CUDA graph is capturing an expert layer of new sizes, and its Triton kernels cannot be "
        "tuned meanwhile: compute the layer once before capturing",
        stacklevel=2,
    )
    return candidates[:1]


def tuned(kernel: Any, *, sums: int = 1) -> Any:
    """Return the kernel with BLOCK_R, BLOCK_N, BLOCK_K, GROUP and EVEN_K filled in.

    ``sums`` is how many tiles of sums it holds in registers.
    """
    if "EVEN_K" in kernel.arg_names:
        even = triton.heuristics({"EVEN_K": lambda given: given["K"] % given["BLOCK_K"] == 0})
        kernel = even(kernel)
    # All dtypes' configurations go in; _to_time() picks those for the arguments' dtype.
    configs = [_SMALL, *(_ONE_SUM if sums == 1 else _TWO_SUMS), *_FLOAT32]
    # These strides tell weights from their transposed view: a tile is then read in another order,
    # and another size may be best.
    layout = [name for name in kernel.arg_names if name in ("SECOND", "b_n", "w1_k", "w2_n")]
    return triton.autotune(
        [_INTERPRETED] if triton.knobs.runtime.interpret else configs,
        key=["E", "K", "N", "R_BUCKET", *layout],
        prune_configs_by={"early_config_prune": _to_time},
        cache_results=True,
    )(kernel)
