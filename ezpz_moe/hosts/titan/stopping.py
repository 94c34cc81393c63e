"""End a run on SIGTERM at a step that all ranks agree on, so that this step can be saved.

A scheduler warns with SIGTERM before its time limit or a preemption. The signal reaches the ranks
at different moments and steps, and perhaps not all of them. All have to save the same step.

Nothing is exchanged between ranks while no one has asked, but once a second each asks the store
whether somebody has. That is done by a thread, which also hears the signal while the main thread
waits in a collective. So a training step costs one comparison, and no device is synchronized.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.tools.logging import logger

EXIT_CODE = 128 + signal.SIGTERM  # the shell's convention for a process that a signal has ended

SECONDS_TO_AGREE = 30
"""The patience with the other ranks' threads, which answer within a second or two."""

SECONDS_FOR_CTRL_C = 30
"""For a rank that Ctrl-C does not interrupt, because it waits for the device or for other ranks."""

SECONDS_TO_CLOSE = 2
"""The patience with our own thread, which asks the store."""

_ASKED = "asked"  # somebody wants the run to end
_END = "end"  # the step at which it does
_CLOSED = 0  # no signal has this number


class Agreement:
    """The step at which all ranks end, as one rank knows it.

    Each rank promises not to go past its next step before it knows the end. The end is the latest
    of all promises: no rank is past it, and each can reach it. A rank that waited for an answer
    from the others' main threads would wait for ever, because they may wait for it in a collective.

    Args:
        store: shared by all ranks, and used by no other thread.
        passed: the last step that this rank has trained.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, ranks: int, passed: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._passed = passed
        self._promised: int | None = None
        self._end: int | None = None
        self._is_known = threading.Event()
        self._lock = threading.Lock()  # between a promise and the step that it is about
        store.set(_pid_of(rank), str(os.getpid()))

    def ends_at(self, step: int) -> bool:
        """Return whether the run ends after ``step``. The main thread asks after each step."""
        with self._lock:
            if self._promised is None:
                self._passed = step
                return False
        self._is_known.wait()
        return step == self._end

    # The rest is for the thread.

    def ask(self) -> None:
        """Let all ranks know that the run has to end."""
        self._store.set(_ASKED, "")

    def is_asked(self) -> bool:
        return bool(self._store.check([_ASKED]))

    def promise(self) -> None:
        with self._lock:
            self._promised = self._passed + 1
        self._store.set(_promise_of(self._rank), str(self._promised))

    def end(self) -> int | None:
        """Return the step at which the run ends; None if it is not known yet."""
        everyone = [_promise_of(rank) for rank in range(self._ranks)]
        if self._rank == 0 and self._store.check(everyone):
            self._store.set(_END, str(max(int(self._store.get(each)) for each in everyone)))
        if not self._store.check([_END]):
            return None
        self._end = int(self._store.get(_END))
        self._is_known.set()
        return self._end

    def has_lost(self, ranks: range) -> bool:
        """Return whether a process of ``ranks``, which are on this machine, has ended."""
        return any(
            self._store.check([_pid_of(rank)]) and not _runs(int(self._store.get(_pid_of(rank))))
            for rank in ranks
        )


class Stopping:
    """Listens for SIGTERM in this rank and in all others, from the first step to the last.

    The main thread constructs it, asks ``ends_at`` after each step, and closes it.
    """

    def __init__(self, passed: int) -> None:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if torch.distributed.get_backend() == "fake":  # a fake group has no other ranks
            rank, ranks = 0, 1
        self._agreement = Agreement(_store(ranks), rank, ranks, passed)
        self._own, self._signals = socket.socketpair()
        self._signals.setblocking(False)
        # The kernel's handler writes the signal's number here at once. Python's own would have to
        # wait for the main thread, and that one for a collective.
        signal.set_wakeup_fd(self._signals.fileno(), warn_on_full_buffer=False)
        # It has nothing to do, but without it SIGTERM would end the process at once.
        signal.signal(signal.SIGTERM, lambda *_: None)
        _keep_from_forks()
        self._is_closed = self._has_finished = False
        self._thread = threading.Thread(target=self._listen, daemon=True, name="ezpz_moe stopping")
        self._thread.start()

    def ends_at(self, step: int) -> bool:
        """Return whether the run ends after ``step``, which then has to be saved."""
        return self._agreement.ends_at(step)

    def finish(self) -> None:
        """Note that the last step is saved. The run ends by itself, and SIGTERM changes nothing."""
        self._has_finished = True

    def close(self) -> None:
        """Stop listening. SIGTERM ends the process at once again."""
        if self._is_closed:
            return
        self._is_closed = True
        _forget()
        self._signals.send(bytes([_CLOSED]))
        # With the machine of the store cut off, it waits for an answer for ever.
        self._thread.join(SECONDS_TO_CLOSE)

    # --- the thread -------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            if self._is_asked_to_end():
                self._agree()
        except Exception as error:
            if not self._has_finished:
                _end_now(f"the ranks cannot agree on a step: {error}")
        while _CLOSED not in self._heard(seconds=None):
            pass

    def _is_asked_to_end(self) -> bool:
        """Wait until somebody wants the run to end; false if it has ended by itself."""
        has_store = True
        while True:
            heard = self._heard(seconds=1 if has_store else None)
            if _CLOSED in heard:
                self._signals.send(bytes([_CLOSED]))  # for `_listen`
                return False
            if signal.SIGTERM in heard:
                self._agreement.ask()
                return True
            # The store may be gone with the machine that had it. The run itself notices that.
            try:
                if has_store and self._agreement.is_asked():
                    return True
            except Exception:  # whatever torch raises of a connection
                has_store = False

    def _agree(self) -> None:
        self._agreement.promise()
        give_up = time.monotonic() + SECONDS_TO_AGREE
        # A rank that has finished answers as well: another may still have to learn that it has.
        while (end := self._agreement.end()) is None and not self._is_closed:
            if not self._has_finished:
                self._end_without(give_up)
            time.sleep(0.05)
        if not self._has_finished:
            logger.info(f"ezpz_moe: SIGTERM: the run ends after step {end}, once that is saved")

    def _end_without(self, give_up: float) -> None:
        """End at once if the others cannot agree on a step any more."""
        # torchrun sends SIGTERM too when a rank has failed. The others wait for that one.
        if self._agreement.has_lost(_ranks_of_this_machine()):
            _end_now("another rank has ended")
        if time.monotonic() > give_up:
            _end_now(f"some ranks did not answer within {SECONDS_TO_AGREE} seconds")

    def _heard(self, *, seconds: float | None) -> bytes:
        """Wait for signals, at most so long; return their numbers."""
        if not select.select([self._own], [], [], seconds)[0]:
            return b""
        numbers = self._own.recv(64)
        if signal.SIGINT in numbers:
            late = threading.Timer(SECONDS_FOR_CTRL_C, os._exit, [128 + signal.SIGINT])
            late.daemon = True
            late.start()
        return numbers


@contextlib.contextmanager
def ctrl_c_unwrapped() -> Iterator[None]:
    """Raise Ctrl-C as itself. DCP makes a failed save or load of whatever it meets, this too.

    Raises:
        KeyboardInterrupt: a rank was interrupted.
    """
    try:
        yield
    except CheckpointException as error:
        if any(isinstance(met, KeyboardInterrupt) for met, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        raise


def end_of_run(trainer: Any) -> SystemExit:
    """Close the trainer as the host does after its last step; return what the caller raises."""
    trainer.close()
    torch.distributed.destroy_process_group()
    return SystemExit(EXIT_CODE)


def _end_now(reason: str) -> None:
    logger.warning(f"ezpz_moe: SIGTERM: {reason}. The run ends without saving.")
    os._exit(EXIT_CODE)


def _forget() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _keep_from_forks() -> None:
    """Let processes that this one forks, such as a data loader's workers, die of SIGTERM as ever.

    They would inherit the handler, and the socket through which it would end the whole run.
    """

    def mask(how: int) -> None:
        signal.pthread_sigmask(how, [signal.SIGTERM])

    def in_child() -> None:
        _forget()
        mask(signal.SIG_UNBLOCK)

    # Blocked in between, or one that is sent at once would still meet the handler.
    os.register_at_fork(
        before=lambda: mask(signal.SIG_BLOCK),
        after_in_parent=lambda: mask(signal.SIG_UNBLOCK),
        after_in_child=in_child,
    )


def _store(ranks: int) -> torch.distributed.Store:
    if ranks == 1:
        return torch.distributed.HashStore()
    # A connection of its own: the process group's is used by other threads.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, wait_for_workers=False)
    # torchrun's store outlives a restart of the ranks.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"ezpz_moe/stopping/{attempt}", store)


def _ranks_of_this_machine() -> range:
    first = torch.distributed.get_rank() - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _pid_of(rank: int) -> str:
    return f"pid/{rank}"


def _promise_of(rank: int) -> str:
    return f"promise/{rank}"


def _runs(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        # Signal 0 is never sent: the kernel only looks whether there is such a process.
        os.kill(pid, 0)
        return True
    return False
