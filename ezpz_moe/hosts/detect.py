"""Find out which host is installed.

A generation is recognized by what the installed torchtitan has, newest first, and never by its
version: the version in a snapshot says little. Nothing here imports torch or the host on its own.
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

# Refusals recommend this pair: the newest release that the plugin is developed with.
RECOMMENDED = {"torch": "2.15.0", "torchtitan": "0.3.0"}

_TITAN_0_3 = Titan03()

# Newest first, because a newer host still has what an older one is recognized by: `derive`, the
# evidence of 0.3, is in every later snapshot too.
HOSTS: tuple[Host, ...] = (
    Titan2026_09(),
    Titan2026_08(),
    _TITAN_0_3,
    Titan02(),
)
"""All hosts, newest first. A new generation needs its own file and one line here."""


@cache
def presumed_host() -> Host:
    """Return the host that the files of the installed torchtitan suggest.

    It imports nothing and refuses nothing. It serves code that runs before torch is imported, such
    as reading a job. If no host is installed, it returns torchtitan 0.3.
    """
    return next((each for each in HOSTS if each.is_written), _TITAN_0_3)


@cache
def host() -> Host:
    """Return the installed host; this imports torchtitan.

    Raises:
        EzpzError: torchtitan is not installed, cannot be imported, or no binding fits it.
    """
    try:
        # Before any evidence is looked up: that imports modules of the host, and the first of them
        # would fix the device type as "cuda".
        _choose_device()
    except EzpzError:
        raise
    except Exception as error:  # importing the host's module can raise anything
        raise _refusal([f"choosing its device: {in_words(error)}"]) from error
    reasons = []
    for candidate in HOSTS:
        # By import, unlike `presumed_host`: a host whose files are there may still not load here.
        if not (reason := candidate.evidence.why_broken()):
            remember(candidate)
            return candidate
        reasons.append(f"{candidate.evidence.thing}: {reason}")
    raise _refusal(reasons)


def check_host() -> None:
    """Refuse a torch or torchtitan that the binding cannot work with.

    Call it before anything else of the host is imported: if there is no accelerator, it imports the
    host with the CPU as its device. A pair that works but is untested is logged once a day.

    Raises:
        EzpzError: the host lacks something that every run needs.
    """
    # The other lines each cost one feature, which says so when somebody asks for it.
    vital = [reliance for reliance in host().relied_on if reliance.vital]
    if missing := broken(vital):
        raise _refusal(_with_meanings(missing))
    if line := notice():
        logger.warning("ezpz_moe: %s", line)


def _with_meanings(missing: Mapping[Reliance, str]) -> list[str]:
    """Return the missing things as text, grouped by consequence: each consequence appears once."""
    by_meaning: dict[str, list[str]] = {}
    for line, reason in missing.items():
        by_meaning.setdefault(line.if_broken, []).append(f"{line.thing}: {reason}")
    return [f"{'; '.join(lines)} ({meaning})" for meaning, lines in by_meaning.items()]


def _choose_device() -> None:
    # Not at the top: hosts.cpu imports torch, and `presumed_host` must work without it.
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
