"""Log at the start of a run what its model consists of: the table of ``ezpz-moe describe``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools import utils
from torchtitan.tools.logging import logger

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.errors import EzpzError, exit_on_user_error
from ezpz_moe.hosts import anatomy_text
from ezpz_moe.hosts.cpu import device_memory
from ezpz_moe.hosts.dry_run import report
from ezpz_moe.hosts.limits import least_bytes
from ezpz_moe.hosts.reliance import in_words
from ezpz_moe.hosts.titan.base import titan
from ezpz_moe.telemetry.text import memory, plain_table


def announcing(spec: ModelSpec, flavor: Flavor) -> None:
    """Make rank 0 of a run log its model's components, and what it holds of them, in place.

    The trainer gives the whole model, on the meta device, to one of the spec's two functions.
    Nothing is synchronized, and a run goes on whatever happens to the counting.

    Args:
        spec: the model of ``flavor`` that a trainer is built from.
        flavor: for its name and its router.
    """
    spec.parallelize_fn = _announced(spec.parallelize_fn, flavor, of_pipeline=False)
    if spec.pipelining_fn is not None:
        spec.pipelining_fn = _announced(spec.pipelining_fn, flavor, of_pipeline=True)


def _announced(cut: Callable[..., Any], flavor: Flavor, *, of_pipeline: bool) -> Callable[..., Any]:
    @functools.wraps(cut)
    def announce_and_cut(model: nn.Module, *, parallel_dims: Any, **more: Any) -> Any:
        # pipelining_fn calls parallelize_fn in turn, for every stage: those models are not whole.
        is_whole = of_pipeline == parallel_dims.pp_enabled
        announces = is_whole and _is_first_of_run()
        if announces:
            # `training` is read in there, where a host that calls it otherwise does no harm.
            _log("what its model consists of", lambda: consists_of(model, flavor, more["training"]))
        result = cut(model, parallel_dims=parallel_dims, **more)
        if announces:
            # pipelining_fn returns the schedule first, then the model parts of this rank.
            parts = result[1] if of_pipeline else [result]
            _log("what rank 0 holds", lambda: _held(parts))
            with exit_on_user_error():
                _refuse_more_than_the_machine_has(parts, _bytes_of_batch(model, **more))
        return result

    return announce_and_cut


def _is_first_of_run() -> bool:
    # The ranks of a dry run train nothing: `preflight` and `describe` have a report of their own.
    return dist.get_rank() == 0 and dist.get_backend() != "fake"


def _log(what: str, tell: Callable[[], str]) -> None:
    """Log what ``tell`` returns about ``what``; if it fails, log why in a line."""
    try:
        logger.info(f"ezpz_moe: {tell()}")
    # Anything: the model is the user's or the host's, and only a table is missing.
    except Exception as error:
        why = in_words(error)
        logger.warning(f"ezpz_moe: the run goes on, but {what} cannot be told: {why}")


def consists_of(model: nn.Module, flavor: Flavor, training: Any) -> str:
    """Return the components of the flavor's whole model on the meta device, as lines.

    Raises:
        EzpzError: its attention does not show its heads.
    """
    # Here, where a failure is caught: the run itself needs nothing of it.
    from ezpz_moe.hosts.titan.anatomy import anatomy_of
    from ezpz_moe.hosts.titan.components import choices

    seq_len = getattr(training, titan().LENGTH.removeprefix("training."))
    # Its own config, and not the flavor's: this is the model that is trained.
    anatomy = anatomy_of(model.config, model, choices(model.config, flavor), seq_len)
    return "\n".join(
        [
            anatomy_text.title(flavor.name, anatomy, seq_len),
            plain_table(anatomy_text.rows(anatomy)),
            *anatomy_text.caveats(anatomy),
        ]
    )


def _bytes_of_batch(model: Any, **more: Any) -> int:
    """Return what a rank holds of a batch at the least; 0 if that cannot be told."""
    try:
        together = titan().sequences(more["training"], more["parallelism"], data_ranks=1)
        tokens = together.of_microbatch * together.length
        return least_bytes(tokens, model.config.dim, len(model.config.layers))
    # Anything, as in `_log`: only a refusal is missing.
    except Exception:
        return 0


def _refuse_more_than_the_machine_has(parts: list[nn.Module], of_batch: int) -> None:
    """Refuse a run whose states or batch a machine without accelerators cannot hold.

    An accelerator's allocator would say so. Here the kernel would end some process, or all swap.

    Args:
        parts: what this rank holds of the model.
        of_batch: bytes that a rank holds of its batch at the least.

    Raises:
        EzpzError: they cannot be held.
    """
    if utils.device_type != "cpu":
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = device_memory("cpu")
    if (needed := ranks * _bytes_held(parts)) > there:
        raise EzpzError(
            f"weights, gradients and optimizer states of the {ranks} rank(s) on this machine take "
            f"{memory(needed)}, and it has {memory(there)}. Train a smaller flavor, or on more "
            "machines that share the model."
        )
    if (needed := ranks * of_batch) > there:
        raise EzpzError(
            f"the batches of the {ranks} rank(s) on this machine take {memory(needed)} at the "
            f"least, for ids and every layer's input, and it has {memory(there)}. Lower "
            "[training] local_batch_size or seq_len."
        )


def _bytes_held(parts: list[nn.Module]) -> int:
    held = report(rank=0, parts=parts).state_bytes
    assert held is not None
    return held


def _held(parts: list[nn.Module]) -> str:
    held = _bytes_held(parts)
    return (
        f"rank 0 of {dist.get_world_size()} holds {memory(held)} of weights, gradients and AdamW's "
        "two moments"
    )
