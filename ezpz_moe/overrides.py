"""Door 2: what ``--override.imports`` names, for any config of the host.

    torchrun ... -m torchtitan.train --module qwen3 --config qwen3_moe_debug \\
        --override.imports 'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}'

Add ``ezpz_moe.overrides.sdpa`` where FlexAttention does not run (CPU, XPU), and
``ezpz_moe.overrides.checkpointer`` for a run that saves its step on SIGTERM. With any of them, rank
0 locks the run's folder. The host logs every node it replaces, and warns when it found none.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_args

from ezpz_moe.config.flavor_schema import ExpertPrecision, Routed
from ezpz_moe.errors import EzpzError, did_you_mean, exit_on_user_error
from ezpz_moe.hosts.detect import host

# At import: the host takes from this module what its decorators have registered by then.
_host = host().overrides()
_EXAMPLE = """'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}'"""


def _for_users(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``factory`` with one line for a mistake, an unknown key among them."""
    _, *keys = inspect.signature(factory).parameters

    @functools.wraps(factory)
    def checked(config: Any, **arguments: Any) -> Any:
        with exit_on_user_error():
            for key in arguments.keys() - set(keys):
                raise EzpzError(
                    f"--override.imports ezpz_moe.overrides.{factory.__name__}: unknown key "
                    f"{key!r}.{did_you_mean(key, keys)} It takes {', '.join(keys) or 'none'}."
                )
            return factory(config, **arguments)

    return checked


@_host.for_experts
@_for_users
def experts(
    config,
    *,
    compute_backend: str | None = None,
    expert_precision: ExpertPrecision | None = None,
    routed: Routed = "one_node",
):
    """Keep the experts, but compute them with ``compute_backend`` in ``expert_precision``.

    ``routed`` is what it is in a flavor.
    """
    if compute_backend is None:
        raise EzpzError(
            f"--override.imports ezpz_moe.overrides.experts: compute_backend is missing. "
            f"Write {_EXAMPLE}."
        )
    if not isinstance(compute_backend, str):
        raise EzpzError(
            f"--override.imports ezpz_moe.overrides.experts: compute_backend = "
            f"{compute_backend!r}: should be a name. Write {_EXAMPLE}."
        )
    if expert_precision is not None:
        _check_choice("expert_precision", expert_precision, get_args(ExpertPrecision))
    _check_choice("routed", routed, get_args(Routed))
    _host.enter_run("ezpz_moe.overrides.experts")
    replacement = _host.selected(
        config, compute_backend, "asked for by ezpz_moe.overrides.experts", expert_precision, routed
    )
    _host.turn_off_cuda_graphs_for(compute_backend)
    _host.warn_of_emulation()
    return replacement


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise EzpzError(
            f"--override.imports ezpz_moe.overrides.experts: {key} = {value!r}: should be one of "
            f"{', '.join(choices)}."
        )


@_host.for_attention
@_for_users
def sdpa(config):
    """Keep the attention, but with causal SDPA as its kernel: no per-document mask."""
    _host.enter_run("ezpz_moe.overrides.sdpa")
    return dataclasses.replace(config, inner_attention=_host.causal_attention(config))


@_host.for_checkpoints
@_for_users
def checkpointer(config):
    """Keep the settings of checkpoints, but save on SIGTERM and resume as our own jobs do."""
    _host.enter_run("ezpz_moe.overrides.checkpointer")
    return _host.our_checkpointer(config)


with exit_on_user_error():
    # At import, too: before it calls anything here, the host looks for each override that the user
    # has named and compares them, with a traceback.
    _host.refuse_overrides_of_job()
