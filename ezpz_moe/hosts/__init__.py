"""Bindings to the trainer: one class for each generation of it.

``host``          what the plugin asks of a trainer: the list of what a new one needs
``detect``        which host is installed
``jobs``          jobs, read with the keys of the installed host
``titan``         torchtitan since 0.3: what its generations share, and a class for each
``titan_0_2``     torchtitan 0.2
``cpu``           the host on a machine without an accelerator: the one place that patches

The others are what bindings share. Only modules below this one import torchtitan; those above
import neither it nor torch by themselves.
"""

from ezpz_moe.hosts.detect import check_host

__all__ = ["check_host"]
