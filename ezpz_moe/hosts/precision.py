"""In which precision a job and its experts compute where the CPU does not multiply bfloat16.

There a job that does not say otherwise trains with ``training.mixed_precision_param = "float32"``,
and its experts compute in float32 too. What is said wins over this rule, in the order of the flag,
the job, and the flavor's ``expert_precision``. Shared by the bindings to all hosts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ezpz_moe.compute.names import name_and_options
from ezpz_moe.compute.native import is_emulated
from ezpz_moe.config.flavor_schema import ExpertPrecision
from ezpz_moe.errors import EzpzError, exit_on_user_error

PARAM = "training.mixed_precision_param"
"""The host's setting, in every generation: what FSDP or autocast computes in."""

HOSTS_CAST = "bfloat16"
"""What the hosts cast rows and weights of the experts to, and so the bindings."""

REASON = (
    "this CPU has no bfloat16 instructions, and torch multiplies bfloat16 on it 10 to 40 times "
    "slower than float32"
)

_is_for_accelerator = ContextVar("is_for_accelerator", default=False)


@contextlib.contextmanager
def as_on_an_accelerator() -> Iterator[None]:
    """Within it this machine's CPU is not asked: the config is of a run on another machine."""
    token = _is_for_accelerator.set(True)
    try:
        yield
    finally:
        _is_for_accelerator.reset(token)


def trains_in_float32(device_type: str) -> bool:
    """Whether a job that does not say otherwise trains in float32 on this machine."""
    return not _is_for_accelerator.get() and is_emulated(device_type, torch.bfloat16)


def experts_dtype(
    asked: ExpertPrecision | None, mixed_precision_param: str, device_type: str
) -> str:
    """The dtype, "bfloat16" or "float32", that experts with a forward of ours compute in.

    Args:
        asked: the flavor's ``expert_precision``.
        mixed_precision_param: what the run trains with.
        device_type: the host's.
    """
    if asked is not None:
        return HOSTS_CAST if asked == "host" else asked
    is_ruled = trains_in_float32(device_type) and mixed_precision_param == "float32"
    return "float32" if is_ruled else HOSTS_CAST


def is_host_path(backend: str) -> bool:
    """Whether ``backend`` is the host's own code, which no precision of ours reaches."""
    return name_and_options(backend)[0] == "grouped_mm"


def refuse_precision(
    asked: ExpertPrecision | None, backend: str, chosen_by: str, *, hosts_forward: str | None = None
) -> None:
    """Refuse a precision that nothing of ours could bring about.

    Args:
        hosts_forward: the experts' class where its forward is the host's, which casts as it does.

    Raises:
        EzpzError: another precision than the host's is asked for, of its own path or forward.
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
    """Which precision applies, for people: the run's, the experts', and why."""
    why = f": {REASON}" if trains_in_float32(device_type) else ""
    return f'{PARAM} = "{mixed_precision_param}", experts in {experts}{why}'


def job_line() -> str:
    """For the log of a run that trains in float32 by the rule: the reason and the way back."""
    return (
        f'ezpz_moe: {PARAM} = "float32": {REASON}. To go back, set '
        f'[training] mixed_precision_param = "bfloat16"'
    )


def door_2_line(mixed_precision_param: str) -> str | None:
    """A warning for a run whose training settings are not ours to change; None where none fits."""
    if mixed_precision_param == "float32":
        return None
    return (
        f"ezpz_moe: {REASON}. Add --training.mixed-precision-param float32, and "
        '"expert_precision": "float32" beside compute_backend'
    )


def in_words(dtype: str, backend: str, device_type: str, *, is_forward_ours: bool) -> str:
    """What experts compute in, as the end of "compute_backend ... in ..."."""
    if dtype != HOSTS_CAST or not is_emulated(device_type, torch.bfloat16):
        return dtype
    if is_host_path(backend):
        return f"{dtype}, which this CPU emulates; for_loop would compute in float32"
    products = f"{dtype} with products in float32"
    return products if is_forward_ours else f"{products} (the rest is the host's forward)"


def agreeing_on_precision(
    parallelize_fn: Callable[..., Any], precision_of: Callable[..., str]
) -> Callable[..., Any]:
    """Wrap a model's ``parallelize_fn`` so that ranks of different machines are refused before it.

    Each rank asks its own CPU, and shards of different dtypes cannot be gathered. All ranks learn
    it, so that the message is printed wherever somebody reads.

    Args:
        precision_of: from the arguments of ``parallelize_fn``, what this rank computes in, in
            words.

    Returns:
        A function that raises EzpzError, and that otherwise waits for every rank once.
    """
    asked = False

    @functools.wraps(parallelize_fn)
    def parallelize(*args: Any, **kwargs: Any) -> Any:
        nonlocal asked  # a rank of a pipeline has several parts of the model
        if not asked:
            asked = True
            with exit_on_user_error():
                _refuse_other_precisions(precision_of(*args, **kwargs))
        return parallelize_fn(*args, **kwargs)

    return parallelize


def _refuse_other_precisions(own: str) -> None:
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if ranks == 1 or torch.distributed.get_backend() == "fake":  # whose other ranks are not there
        return
    default = torch.distributed.distributed_c10d._get_default_store()
    store = torch.distributed.PrefixStore("ezpz_moe/precision", default)
    store.add(own, 1)
    if store.add("arrived", 1) == ranks:
        store.set("all arrived", "")
    store.wait(["all arrived"])
    if (alike := store.add(own, 0)) != ranks:
        raise EzpzError(
            f"{alike} of the {ranks} ranks, including this one, would train with {own}, but "
            f"{ranks - alike} would not: their CPUs multiply different dtypes. Choose one "
            "precision for all: set [training] mixed_precision_param in the job, and "
            "expert_precision in the flavor."
        )
