"""The host's trainer, started where it would not start by itself.

``python -m ezpz_moe.train ARGUMENTS`` is ``python -m torchtitan.train ARGUMENTS``: the same module
with the same arguments. Two things come first: the check that torch and torchtitan can do what the
binding needs, and, on a machine without an accelerator, the CPU as the host's device. Start it
under torchrun, as the host's own; :mod:`ezpz_moe.launch` does.
"""

from __future__ import annotations

import os
import runpy
import signal
import time

from ezpz_moe.errors import EXIT_CODE, exit_on_user_error
from ezpz_moe.hosts import check_host

_SECONDS_FOR_RANK_0 = 30


def main() -> None:
    """Run ``torchtitan.train``; a user's mistake ends it with one message and exit code 2."""
    try:
        with exit_on_user_error():
            check_host()
            runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # Ctrl-C, which torchrun hands on: no traceback for each rank
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as stop:
        # All ranks meet the same mistake, local rank 0 reports it, and torchrun ends every rank as
        # soon as one has ended. Let that be rank 0, or its message could be lost.
        if stop.code == EXIT_CODE and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_RANK_0)
        raise


if __name__ == "__main__":
    main()
