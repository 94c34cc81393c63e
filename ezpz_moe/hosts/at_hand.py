"""The host at hand, for the modules of its binding: they cannot ask ``detect``, which imports them.

:func:`ezpz_moe.hosts.detect.host`, which is always called first, stores it here.
"""

from __future__ import annotations

from ezpz_moe.hosts.host import Host

_found: list[Host] = []


def remember(host: Host) -> None:
    """Make ``host`` the one at hand."""
    _found[:] = [host]


def at_hand() -> Host:
    """The host that was found last."""
    assert _found, "detect.host() comes first"
    return _found[0]
