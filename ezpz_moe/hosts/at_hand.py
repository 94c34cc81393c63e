"""Keep the detected host for the modules of its binding.

They cannot ask ``detect``, because it imports them. :func:`ezpz_moe.hosts.detect.host` always
runs first and stores the host here.
"""

from __future__ import annotations

from ezpz_moe.hosts.host import Host

_found: list[Host] = []


def remember(host: Host) -> None:
    """Store ``host`` as the current host."""
    _found[:] = [host]


def at_hand() -> Host:
    """Return the host that was detected last."""
    assert _found, "detect.host() comes first"
    return _found[0]
