"""Start the host's trainer, also where it would not start by itself.

``python -m ezpz_moe.train ARGUMENTS`` is ``python -m torchtitan.train ARGUMENTS``: the same module
with the same arguments. Two things happen first: a check that torch and torchtitan can do what the
binding needs and, on a machine without an accelerator, the CPU becomes the host's device, and freed
memory is kept (:mod:`ezpz_moe.tools.allocator`). One thing happens last: a run that ended well
stays so. Start it under torchrun, like the host's own trainer; :mod:`ezpz_moe.tools.launch` does.
If torchrun is killed, its workers end too.
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
from ezpz_moe.tools import allocator

_SECONDS_FOR_RANK_0 = 30


def main() -> None:
    """Run ``torchtitan.train``; a user's mistake ends it with one message and exit code 2."""
    try:
        with exit_on_user_error():
            check_host()
            _keep_memory()
            runpy.run_module("torchtitan.train", run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # torchrun passes Ctrl-C on; spare the user a traceback per rank
        raise SystemExit(128 + signal.SIGINT) from None
    except SystemExit as stop:
        # All ranks meet the same mistake, local rank 0 reports it, and torchrun ends every rank as
        # soon as one ends. Let rank 0 be that one, or its message could be lost.
        if stop.code == EXIT_CODE and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_SECONDS_FOR_RANK_0)
        raise


def _keep_memory() -> None:
    """On the CPU, keep the memory that is freed; local rank 0 says so for all."""
    if not allocator.is_wanted():
        return
    # Not at the top: it imports torch, and `check_host` is what says whether there is one.
    from ezpz_moe.hosts.cpu import no_accelerator

    if not no_accelerator():
        return
    line = allocator.keep_freed_memory()
    if line and os.environ.get("LOCAL_RANK", "0") == "0":
        # The host sets up its log later, and drops what was logged before.
        print(f"ezpz_moe: {line}", flush=True)  # noqa: T201


def _end_with(launcher: int) -> None:
    """End this process, and what it has started, soon after its launcher.

    A launcher that is killed cannot end its workers. They would train on, and nobody would know.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    if os.getpgrp() == os.getpid():  # torchrun starts every worker as the head of a group
        os.killpg(0, signal.SIGKILL)
    os._exit(128 + signal.SIGKILL)


_exit_code: int | None = None
"""Set once a run has ended as it should: trained to its end, or saved and stopped by SIGTERM."""


def _end_without_teardown() -> None:
    """End the process before the interpreter tears down, if its run ended as it should.

    A gloo thread may still hold tensors that Python knows about. If it releases them during
    teardown, torch aborts the process (pytorch/pytorch#179291), and a run that trained to its end
    would count as failed.
    """
    if _exit_code is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code)


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker of torchrun, which is its parent
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    # atexit runs the last handler first: those of the host and of wandb come before this one.
    atexit.register(_end_without_teardown)
    try:
        main()
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            _exit_code = stop.code
        raise
    _exit_code = 0
