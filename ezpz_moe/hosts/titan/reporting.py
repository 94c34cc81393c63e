"""Choose what a job reports: the host's metrics, or those that watch the routers."""

from __future__ import annotations

from math import gcd
from typing import Any

from ezpz_moe.config.flavors import Flavor
from ezpz_moe.config.telemetry_schema import Telemetry
from ezpz_moe.hosts.backends import backend_of
from ezpz_moe.hosts.cpu import no_accelerator
from ezpz_moe.hosts.titan.base import titan


def reporting_drops(flavor: Flavor) -> Flavor:
    """Return ``flavor`` with telemetry if its backend drops tokens, to report them in every run.

    Raises:
        EzpzError: the backend does not load or takes no such options.
    """
    drops_tokens = backend_of(flavor).drops_tokens
    if flavor.telemetry is None and drops_tokens:
        return flavor.model_copy(update={"telemetry": Telemetry()})
    return flavor


def metrics(flavor: Flavor, default: Any) -> Any:
    """Return the config of the metrics of a flavor's run; ``default`` is the host's."""
    if flavor.is_watched:
        return _watching(flavor.reported)
    return _without_mfu(default) if no_accelerator() else default


def _watching(telemetry: Telemetry | None) -> Any:
    """Return the host's defaults with ``telemetry``; it logs whenever the routers report."""
    with titan().importing():  # only such a flavor needs this from the host
        from ezpz_moe.hosts.titan.metrics import RouterMetrics
    config = RouterMetrics.Config(telemetry=telemetry)
    if telemetry:
        # A common divisor: a record is written only on a step that the host logs.
        config.log_freq = gcd(config.log_freq, *telemetry.cadences.values())
    return config


def _without_mfu(metrics: Any) -> Any:
    """Return the host's defaults for a run on a CPU, whose MFU means nothing."""
    # No run ends for a figure in its log: `ezpz-moe doctor` says what has changed in the host.
    try:
        from ezpz_moe.hosts.titan.cpu_metrics import CpuMetrics
    except (ImportError, AttributeError, TypeError):
        return metrics
    return CpuMetrics.Config()
