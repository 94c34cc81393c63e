"""Door 2: what ``--override.imports`` names, for any config of the host.

    torchrun ... -m torchtitan.train --module qwen3 --config qwen3_moe_debug \\
        --override.imports 'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}'

Add ``ezpz_moe.overrides.sdpa`` where FlexAttention does not run (CPU, XPU), and
``ezpz_moe.overrides.checkpointer`` for a run that saves its step on SIGTERM. With any of them, rank
0 locks the run's folder. The host logs every node it replaces, and warns when it found none.
"""

import dataclasses
from typing import get_args

from ezpz_moe.config.flavor_schema import ExpertPrecision
from ezpz_moe.errors import EzpzError, did_you_mean, exit_on_user_error
from ezpz_moe.hosts.detect import host

# At import: the host takes from this module what its decorators have registered by then.
_host = host().overrides()
with exit_on_user_error():
    # Now, too: before it calls anything here, the host compares the overrides, with a traceback.
    _host.refuse_overrides_of_job()
_KEYS = ("compute_backend", "expert_precision")
_EXAMPLE = """'ezpz_moe.overrides.experts={"compute_backend": "for_loop"}'"""


@_host.for_experts
def experts(
    config,
    *,
    compute_backend: str | None = None,
    expert_precision: ExpertPrecision | None = None,
    **unknown,
):
    """Keep the experts, but compute them with ``compute_backend`` in ``expert_precision``."""
    with exit_on_user_error():
        for key in unknown:
            raise EzpzError(
                f"--override.imports ezpz_moe.overrides.experts: unknown key {key!r}."
                f"{did_you_mean(key, _KEYS)} It takes {' and '.join(_KEYS)}."
            )
        if compute_backend is None:
            raise EzpzError(
                f"--override.imports ezpz_moe.overrides.experts: compute_backend is missing. "
                f"Write {_EXAMPLE}."
            )
        if expert_precision not in (None, *get_args(ExpertPrecision)):
            raise EzpzError(
                f"--override.imports ezpz_moe.overrides.experts: expert_precision = "
                f"{expert_precision!r}: should be one of {', '.join(get_args(ExpertPrecision))}."
            )
        _host.enter_run("ezpz_moe.overrides.experts")
        replacement = _host.selected(
            config, compute_backend, "asked for by ezpz_moe.overrides.experts", expert_precision
        )
        _host.turn_off_cuda_graphs_for(compute_backend)
        _host.warn_of_emulation()
        return replacement


@_host.for_attention
def sdpa(config):
    """Keep the attention, but with causal SDPA as its kernel: no per-document mask."""
    with exit_on_user_error():
        _host.enter_run("ezpz_moe.overrides.sdpa")
    return dataclasses.replace(config, inner_attention=_host.causal_attention(config))


@_host.for_checkpoints
def checkpointer(config):
    """Keep the settings of checkpoints, but save on SIGTERM and resume as our own jobs do."""
    with exit_on_user_error():
        _host.enter_run("ezpz_moe.overrides.checkpointer")
    return _host.our_checkpointer(config)
