"""Bindings to the trainer, one folder per host generation.

Only modules below this one import torchtitan. This one imports neither it nor torch by itself.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

from ezpz_moe.errors import EzpzError

logger = logging.getLogger(__name__)

# (torch, torchtitan) that the whole test suite has passed with; docs/hosts.md shows them.
TESTED_PAIRS = (("2.15.0", "0.3.0"),)

# What the package or the host itself cannot do without. Versions are not compared: a newer or a
# patched host that has all of it works.
_NEEDED = (
    "torch.distributed:set_timeout",
    "torchtitan.config.override:derive",
    "torchtitan.models.common.moe:RoutedExperts",
    "torchtitan.models.common.moe:GroupedExperts._grouped_mm",
)


def check_host() -> None:
    """Refuse a torch or torchtitan that the binding cannot work with.

    Call it before anything of the host is imported: where no accelerator exists, the host is
    imported here, with the CPU as its device. A pair that works but is untested is logged.

    Raises:
        EzpzError: something that the binding needs is missing.
    """
    found = {name: _version(name) for name in ("torch", "torchtitan")}
    if problems := _problems():
        torch, titan = TESTED_PAIRS[-1]
        versions = (f"{name} {version or 'not installed'}" for name, version in found.items())
        raise EzpzError(
            f"ezpz_moe cannot work with {' and '.join(versions)}: {'; '.join(problems)}. "
            f"Tested: {_tested()}. "
            f"Install with: pip install 'torch=={torch}' 'torchtitan=={titan}'"
        )
    if tuple(found.values()) not in TESTED_PAIRS:
        logger.warning(
            "ezpz_moe is untested with torch %s and torchtitan %s (tested: %s). It has what the "
            "binding needs, so the run goes on; `ezpz-moe verify` checks the backends.",
            *found.values(),
            _tested(),
        )


def _problems() -> list[str]:
    """What cannot be imported or is not there, in Python's own words."""
    problems = []
    checks: list[Callable[[], Any]] = [_choose_device]
    checks += [partial(pkgutil.resolve_name, need) for need in _NEEDED]
    for check in checks:
        try:
            check()
        except (ImportError, AttributeError) as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def _choose_device() -> None:
    from ezpz_moe.hosts.cpu import import_host_on_cpu, no_accelerator

    if no_accelerator():
        import_host_on_cpu()


def _version(distribution: str) -> str | None:
    """The installed version without its local part ("2.15.0+cu130" is 2.15.0)."""
    try:
        return metadata.version(distribution).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _tested() -> str:
    return ", ".join(f"torch {torch} with torchtitan {titan}" for torch, titan in TESTED_PAIRS)
