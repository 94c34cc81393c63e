"""Choose the precision of a job and its experts on a CPU that does not multiply bfloat16.

On such a CPU, a job that does not say otherwise trains with
``training.mixed_precision_param = "float32"``, and its experts compute in float32 too. Explicit
settings win over this rule: first the flag, then the job, then the flavor's ``expert_precision``.
Shared by all bindings.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ezpz_moe.compute.names import name_and_options
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.config.flavor_schema import ExpertPrecision
from ezpz_moe.errors import EzpzError, exit_on_user_error

PARAM = "training.mixed_precision_param"
"""The host's setting, in every generation: the dtype that FSDP or autocast computes in."""

HOSTS_CAST = "bfloat16"
"""The dtype that the hosts, and so the bindings, cast the experts' rows and weights to."""

REASON = (
    "this CPU has no bfloat16 instructions, and torch multiplies bfloat16 on it 10 to 40 times "
    "slower than float32"
)

# A context variable instead of an argument: the host builds the config and calls us from there, so
# there is no way to pass an argument through.
_is_for_accelerator = ContextVar("is_for_accelerator", default=False)


@contextlib.contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Ignore this machine's CPU: inside it, configs are those of a run on an accelerator."""
    token = _is_for_accelerator.set(True)
    try:
        yield
    finally:
        _is_for_accelerator.reset(token)


def trains_in_float32(device_type: str) -> bool:
    """Return whether a job that does not say otherwise trains in float32 on this machine."""
    return not _is_for_accelerator.get() and is_emulated(device_type, torch.bfloat16)


def experts_dtype(
    asked: ExpertPrecision | None, mixed_precision_param: str, device_type: str
) -> str:
    """Return the dtype, "bfloat16" or "float32", of experts that compute with our own forward.

    Args:
        asked: the flavor's ``expert_precision``.
        mixed_precision_param: what the run trains with.
        device_type: the host's.
    """
    if asked is not None:
        return HOSTS_CAST if asked == "host" else asked
    # Both conditions: if a flag sets the run back to bfloat16, the experts follow it. They would
    # otherwise be the only part in float32, and nobody asked for that.
    is_ruled = trains_in_float32(device_type) and mixed_precision_param == "float32"
    return "float32" if is_ruled else HOSTS_CAST


def is_host_path(backend: str) -> bool:
    """Return whether ``backend`` is the host's own code, which no precision of ours reaches."""
    return name_and_options(backend)[0] == "grouped_mm"


def refuse_precision(
    asked: ExpertPrecision | None, backend: str, chosen_by: str, *, hosts_forward: str | None = None
) -> None:
    """Refuse a precision that our code could not bring about.

    Args:
        asked: the flavor's ``expert_precision``.
        backend: what computes the experts.
        chosen_by: who asked for it, for the message.
        hosts_forward: name of the experts' class if they keep the host's forward, with its casts.

    Raises:
        EzpzError: the host's own path or forward is asked for a precision other than its own.
    """
    where = f"expert_precision = {asked!r} ({chosen_by})"
    if is_host_path(backend) and asked not in (None, "host"):
        raise EzpzError(
            f"{where}: cannot be combined with compute_backend {backend!r}, which reproduces "
            "torchtitan's own results bit for bit. Choose another backend, such as 'for_loop', or "
            "remove expert_precision."
        )
    if hosts_forward and asked == "float32":
        raise EzpzError(
            f"{where}: {hosts_forward} uses torchtitan's own forward, which casts to "
            f"{HOSTS_CAST}; a backend computes only its products. Remove expert_precision: on a "
            f"CPU that emulates {HOSTS_CAST} those products are in float32 anyway."
        )


def of_run(mixed_precision_param: str, experts: str, device_type: str) -> str:
    """Describe the precision of a run: the run's, the experts' if there are any, and why."""
    why = f": {REASON}" if trains_in_float32(device_type) else ""
    of_experts = f", experts in {experts}" if experts else ""
    return f'{PARAM} = "{mixed_precision_param}"{of_experts}{why}'


def job_line() -> str:
    """Return the log line of a run that trains in float32 by the rule: why, and how to go back."""
    return (
        f'ezpz_moe: {PARAM} = "float32": {REASON}. To go back, set '
        f'[training] mixed_precision_param = "bfloat16"'
    )


def door_2_line(mixed_precision_param: str) -> str | None:
    """Return a warning for a run whose training settings we may not change, or None."""
    if mixed_precision_param == "float32":
        return None
    return (
        f"ezpz_moe: {REASON}. Add --training.mixed-precision-param float32, and "
        '"expert_precision": "float32" beside compute_backend'
    )


def in_words(dtype: str, backend: str, device_type: str, *, is_forward_ours: bool) -> str:
    """Describe what experts compute in, as the end of "compute_backend ... in ..."."""
    if dtype != HOSTS_CAST or not is_emulated(device_type, torch.bfloat16):
        return dtype
    if is_host_path(backend):
        return f"{dtype}, which this CPU emulates; for_loop would compute in float32"
    products = f"{dtype} with products in float32"
    return products if is_forward_ours else f"{products} (the rest is the host's forward)"


def agreeing_on_precision(
    parallelize_fn: Callable[..., Any], precision_of: Callable[..., str]
) -> Callable[..., Any]:
    """Wrap a model's ``parallelize_fn`` to refuse ranks that would compute in different dtypes.

    Each rank asks its own CPU, so machines of different kinds can disagree, and shards of different
    dtypes cannot be gathered. All ranks learn of it: the message appears wherever someone reads.

    Args:
        parallelize_fn: the model's.
        precision_of: returns, from the arguments of ``parallelize_fn``, what this rank computes in,
            in words.

    Returns:
        A function that raises EzpzError, and that otherwise waits for every rank once.
    """
    asked = False

    @functools.wraps(parallelize_fn)
    def parallelize(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked  # a rank of a pipeline has several parts of the model
        if not asked:
            asked = True
            # The host would print a traceback on every rank.
            with exit_on_user_error():
                _refuse_other_precisions(precision_of(*args, **kwargs))
        return parallelize_fn(*args, **kwargs)

    return parallelize


def _refuse_other_precisions(own: str) -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1 or torch.distributed.get_backend() == "fake":  # a fake group has no other ranks
        return
    # The store and not a collective: it needs no device and no tensors, and its counters work even
    # if the ranks disagree, which is the case to detect.
    default = torch.distributed.distributed_c10d._get_default_store()
    # torchrun's store outlives a restart of the ranks, with the counters of the attempt before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"ezpz_moe/precision/{attempt}", default)
    # Each rank counts itself under its own precision, and only then as arrived. When the last one
    # has arrived, all counters are complete.
    store.add(own, 1)
    if store.add("arrived", 1) == ranks:
        store.set("all arrived", "")
    store.wait(["all arrived"])
    # add(key, 0) reads a counter.
    if (alike := store.add(own, 0)) != ranks:
        raise EzpzError(
            f"{alike} of the {ranks} ranks, including this one, would train with {own}, but "
            f"{ranks - alike} would not: their CPUs multiply different dtypes. Choose one "
            "precision for all: set [training] mixed_precision_param in the job, and "
            "expert_precision in the flavor."
        )
