"""Start the host's trainer, also where it would not start by itself.

``python -m ezpz_moe.train ARGUMENTS`` is ``python -m torchtitan.train ARGUMENTS``: the same module
with the same arguments. Two things happen first: a check that torch and torchtitan can do what the
binding needs and, on a machine without an accelerator, the CPU becomes the host's device. One thing
happens last: a run that ended well stays so. Start it under torchrun, like the host's own trainer;
:mod:`ezpz_moe.tools.launch` does.
"""

from __future__ import annotations

import atexit
import logging
import os
import runpy
import signal
import sys
import threading
import time

from ezpz_moe.errors import EXIT_CODE, exit_on_user_error
from ezpz_moe.hosts.detect import check_host

_SECONDS_FOR_RANK_0 = 30


def main() -> None:
    """Run ``torchtitan.train``; a user's mistake ends it with one message and exit code 2."""
    try:
        with exit_on_user_error():
            check_host()
            runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # torchrun passes Ctrl-C on; spare the user a traceback per rank
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as stop:
        # All ranks meet the same mistake, local rank 0 reports it, and torchrun ends every rank as
        # soon as one ends. Let rank 0 be that one, or its message could be lost.
        if stop.code == EXIT_CODE and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_RANK_0)
        raise


_has_ended_well = threading.Event()


def _end_without_teardown() -> None:
    """End the process before the interpreter tears down, if its run ended well.

    A gloo thread may still hold tensors that Python knows about. If it releases them during
    teardown, torch aborts the process (pytorch/pytorch#179291), and a run that trained to its end
    would count as failed.
    """
    if _has_ended_well.is_set():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    # atexit runs the last handler first: those of the host and of wandb come before this one.
    atexit.register(_end_without_teardown)
    main()
    _has_ended_well.set()
