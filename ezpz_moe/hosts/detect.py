"""Which host is installed.

It is recognized by what the installed torchtitan has, the newest first, and never by its version: a
snapshot's version says little. Nothing here imports torch or the host by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import cache

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.at_hand import remember
from ezpz_moe.hosts.host import Host
from ezpz_moe.hosts.reliance import Reliance, broken, in_words
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan.v2026_08 import Titan2026_08
from ezpz_moe.hosts.titan.v2026_09 import Titan2026_09
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02
from ezpz_moe.hosts.untested import installed_pair, notice, tested_pairs

logger = logging.getLogger(__name__)

# What a refusal says to install: the newest release that the plugin is developed with.
RECOMMENDED = {"torch": "2.15.0", "torchtitan": "0.3.0"}

_TITAN_0_3 = Titan03()

HOSTS: tuple[Host, ...] = (
    Titan2026_09(),
    Titan2026_08(),
    _TITAN_0_3,
    Titan02(),
)
"""The newest first. A new generation is its file, and its line here."""


@cache
def presumed_host() -> Host:
    """The host by the files of the installed torchtitan: nothing is imported, nothing refused.

    For what is done before torch is imported, such as reading a job. Without a host,
    torchtitan 0.3.
    """
    return next((each for each in HOSTS if each.is_written), _TITAN_0_3)


@cache
def host() -> Host:
    """The installed host; torchtitan is imported for it.

    Raises:
        EzpzError: no binding fits its generation, it cannot be imported, or it is not installed.
    """
    try:
        _choose_device()
    except EzpzError:
        raise
    except Exception as error:  # whatever the host's module raises when it is imported
        raise _refusal([f"choosing its device: {in_words(error)}"]) from error
    reasons = []
    for candidate in HOSTS:
        if not (reason := candidate.evidence.why_broken()):
            remember(candidate)
            return candidate
        reasons.append(f"{candidate.evidence.thing}: {reason}")
    raise _refusal(reasons)


def check_host() -> None:
    """Refuse a torch or torchtitan that the binding cannot work with.

    Call it before anything of the host is imported: where no accelerator exists, the host is
    imported here, with the CPU as its device. A pair that works but is untested is logged, once a
    day.

    Raises:
        EzpzError: something that nothing can be trained without is missing.
    """
    vital = [reliance for reliance in host().relied_on if reliance.vital]
    if missing := broken(vital):
        raise _refusal(_with_meanings(missing))
    if line := notice():
        logger.warning("ezpz_moe: %s", line)


def _with_meanings(missing: Mapping[Reliance, str]) -> list[str]:
    """What is missing, and after all that means the same, what it means."""
    by_meaning: dict[str, list[str]] = {}
    for line, reason in missing.items():
        by_meaning.setdefault(line.if_broken, []).append(f"{line.thing}: {reason}")
    return [f"{'; '.join(lines)} ({meaning})" for meaning, lines in by_meaning.items()]


def _choose_device() -> None:
    from ezpz_moe.hosts.cpu import import_host_on_cpu, no_accelerator

    if no_accelerator():
        import_host_on_cpu()


def _refusal(reasons: Iterable[str]) -> EzpzError:
    install = " ".join(f"'{name}=={number}'" for name, number in RECOMMENDED.items())
    versions = (
        f"{name} {version or 'not installed'}"
        for name, version in zip(RECOMMENDED, installed_pair(), strict=True)
    )
    return EzpzError(
        f"ezpz_moe cannot work with {' and '.join(versions)}: "
        f"{'; '.join(dict.fromkeys(reasons))}. Tested: {tested_pairs()}. "
        f"Install with: pip install {install}"
    )
