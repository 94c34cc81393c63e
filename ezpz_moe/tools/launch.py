"""Start the trainer: torchrun on this machine, around ``python -m ezpz_moe.train``.

The arguments are those of the host's own ``run_train.sh``. With several machines, each starts its
own torchrun, and if one is lost the others say which (:mod:`ezpz_moe.tools.nodes`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ezpz_moe.errors import EXIT_CODE, EzpzError
from ezpz_moe.hosts import run_folder
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.tools.early_refusals import refuse_attention, refuse_sizes
from ezpz_moe.tools.nodes import Node, Placement, loss_report, meet
from ezpz_moe.tools.resume_point import flags_to_resume
from ezpz_moe.tools.trainer_settings import (
    CheckpointSettings,
    checkpoint_settings,
    pipeline_degree,
)

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from ezpz_moe.config.job import Job

# torchrun's own patience is 30 seconds, in which a large model may not be saved.
SECONDS_TO_SAVE = 300
"""From the signal that ends a run with checkpoints until its workers are killed."""

_PATIENCE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's own variable, for the same seconds
_SHOWN_RANKS = "LOG_RANK"  # the host's own variable
_TRAINER = ("--module", "ezpz_moe.train")
# By default torchrun uses this machine's name; where that cannot be resolved, it waits long.
HERE = ("--standalone", "--local-addr", "localhost")

Tell = Callable[[str], None]
"""Takes what the user must know about how the run ended."""


def train(
    config: str,
    host_flags: list[str],
    *,
    tell: Tell,
    nproc: int = 1,
    placement: Placement | None = None,
    from_last_whole: bool = False,
) -> int:
    """Train ``config`` with ``nproc`` processes on this machine and wait for them.

    Output appears live: of the first rank, those in ``LOG_RANK``, and one with a pipeline's loss.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        tell: takes torchrun's report of a failure, that of the node that was lost, or what a
            stopped run has saved.
        nproc: processes on this machine, one per accelerator.
        placement: this machine's place among several; None if it is the only one.
        from_last_whole: whether to resume from an earlier step if the newest is damaged.

    Returns:
        An exit code: 0; 2 for a user's mistake that a worker has already reported; 1 for any other
            failure, whose report ``tell`` was given; 128 + n when signal n ended the run before its
            last step was saved.

    Raises:
        EzpzError: ``config``, ``nproc`` or ``placement`` is wrong, the checkpoint to resume from is
            damaged, another run has the dump folder, or a machine did not show up. Nothing has been
            started then.
    """
    start = prepared(config, host_flags, nproc, placement, from_last_whole=from_last_whole)
    ending = _Ending(start.settings, tell, start.back)
    if placement is None:
        return run_ranks(start.arguments, ending)
    with meet(placement, nproc) as nodes:
        return run_ranks(
            start.arguments, replace(ending, nodes=nodes, own_rank=placement.node_rank)
        )


@dataclass(frozen=True)
class Start:
    """A run that nothing speaks against so far.

    Attributes:
        job: what is trained.
        settings: where its checkpoints are.
        back: how it goes back to an earlier step than the newest; None if it does not.
        arguments: torchrun's.
    """

    job: Job
    settings: CheckpointSettings
    back: _Return | None
    arguments: list[str]


def prepared(
    config: str,
    host_flags: list[str],
    nproc: int,
    placement: Placement | None,
    *,
    from_last_whole: bool,
) -> Start:
    """Check what can be checked before a run is started.

    Raises:
        EzpzError: as :func:`train`, but for machines that do not show up.
    """
    # Check before importing torch: most mistakes then show without a wait.
    job = find_job(config)
    if nproc < 1:
        raise EzpzError(f"--nproc {nproc}: must be at least 1 process.")
    refuse_attention(job, host_flags)
    refuse_sizes(job, host_flags)
    settings = checkpoint_settings(job, host_flags)
    # Rank 0 refuses too, but only when all ranks have started.
    if settings.is_saving:
        run_folder.refuse_if_held(settings.dump_folder)
    # The user's flags come last: nothing may follow a subcommand (activation-checkpoint:full).
    resuming = flags_to_resume(settings, from_last_whole=from_last_whole)
    arguments = [*_TRAINER, *presumed_host().arguments(job), *resuming, *host_flags]
    back = _Return.of(settings, resuming)
    _check_processes(nproc)
    share_threads(nproc)
    workers = _workers(nproc, placement, pipeline_degree(job, host_flags)) + _patience(settings)
    where = placement.torchrun_arguments if placement else HERE
    return Start(job, settings, back, [*workers, *where, *arguments])


@dataclass(frozen=True)
class _Return:
    """A run's way back to an earlier step than the newest, which it sets aside once it has loaded.

    Attributes:
        step: the earlier one.
        newest: the folder of the newest.
        inode: what identifies that folder: the new attempt may save a step of the same name.
    """

    step: int
    newest: Path
    inode: int

    @classmethod
    def of(cls, settings: CheckpointSettings, flags: list[str]) -> _Return | None:
        """Return how a run goes back whose step is ``load_step``, or in ``flags`` to resume."""
        step = int(flags[-1]) if flags else settings.load_step
        newest = settings.newest()
        if not settings.is_enabled or step is None or newest is None or newest <= step:
            return None
        folder = settings.folder / f"step-{newest}"
        return cls(step, folder, folder.stat().st_ino)

    def is_pending(self) -> bool:
        """Whether the newest step has not been set aside yet."""
        return self.newest.exists() and self.newest.stat().st_ino == self.inode


@dataclass(frozen=True)
class _Ending:
    """What the user is told when a run has not ended by itself.

    Attributes:
        settings: where the run's checkpoints are.
        tell: takes the text.
        back: how the run goes back to an earlier step than the newest; None if it does not.
        nodes: all machines of the run; none if this is the only one.
        own_rank: this machine's place among them.
    """

    settings: CheckpointSettings
    tell: Tell
    back: _Return | None = None
    nodes: Sequence[Node] = ()
    own_rank: int = 0

    def failed(self, failure: ChildFailedError) -> int:
        """Tell which node was lost and how to continue; torchrun's own report if none was."""
        # exit_on_user_error() has printed the message in the worker.
        if any(worker.exitcode == EXIT_CODE for worker in failure.failures.values()):
            return EXIT_CODE
        # The first in time: others may have failed because of it.
        first = failure.get_first_failure()[1]
        # The signal went to a worker or to another machine, and not to this launcher. A worker that
        # has heard it ends with this code (hosts/titan/stopping.py).
        if first.exitcode == 128 + signal.SIGTERM:
            return self.stopped(signal.SIGTERM)
        # A surviving worker's own error says only that a communication timed out.
        report = loss_report(self.nodes, self.own_rank, last_words(first))
        if report is None:
            self.tell(str(failure))
        else:
            self.tell(f"ezpz-moe: error: {report}\n{self._how_to_go_on()}")
        return 1

    def stopped(self, by: signal.Signals) -> int:
        """Tell from which step a stopped run resumes; return 0 if its last step is saved."""
        # A worker that hears SIGTERM after its last step goes on to its own end.
        if by == signal.SIGTERM and self._has_last_step():
            self.tell(f"ezpz-moe: {by.name} came when the last step had been saved.")
            return 0
        self.tell(f"ezpz-moe: stopped by {by.name}. {self._how_to_go_on()}")
        return 128 + by  # the shell's convention

    def _has_last_step(self) -> bool:
        last, newest = self.settings.last_step, self.settings.newest()
        has_it = last is not None and newest is not None and newest >= last
        return self.settings.is_saving and has_it and not (self.back and self.back.is_pending())

    def _how_to_go_on(self) -> str:
        if not self.settings.is_enabled:
            return "Nothing was saved, because checkpoints are off ([checkpoint] enable)."
        again = f"To continue, run the same command again{' on every node' if self.nodes else ''}"
        if self.back and self.back.is_pending():
            # Without load_step it would resume from the attempt that the user has given up.
            step = self.settings.folder / f"step-{self.back.step}"
            return f"{again}: nothing has been saved yet, and it resumes from {step}."
        newest, load_step = self.settings.newest(), self.settings.load_step
        if newest is None:
            return f"{again}. There is no checkpoint to resume from: it begins at step 1."
        if load_step not in (None, newest):
            again += ", without checkpoint.load_step"
        return f"{again}: it resumes from {self.settings.folder / f'step-{newest}'}."


def _workers(nproc: int, placement: Placement | None, degree: int) -> list[str]:
    """Return torchrun's arguments about the workers of this machine; choose whose output shows."""
    nnodes = placement.nnodes if placement else 1
    shown = _shown_ranks(degree, nproc, nnodes)
    # The trainer counts ranks over all machines, and warns if the loss is on a hidden one.
    os.environ[_SHOWN_RANKS] = _on_all_nodes(shown, nproc, nnodes)
    # To torchrun, 3 means stdout and stderr. Lines of a single rank need no prefix.
    prefix = ["--role", "rank", "--tee", "3"] if "," in shown else []  # "[rank0]:" before each line
    return ["--nproc-per-node", str(nproc), "--local-ranks-filter", shown, *prefix]


def _patience(settings: CheckpointSettings) -> list[str]:
    """Return how long torchrun waits for workers that it has passed a signal on to."""
    # torchrun reads its variable only without the flag, which would overrule the user.
    if not settings.is_saving or _PATIENCE in os.environ:
        return []
    return ["--shutdown-timeout", str(SECONDS_TO_SAVE)]


class Ending(Protocol):
    """What becomes of ranks that have not ended by themselves."""

    def failed(self, failure: ChildFailedError) -> int:
        """Return the exit code after a rank's failure."""

    def stopped(self, by: signal.Signals) -> int:
        """Return the exit code after a signal."""


def run_ranks(arguments: list[str], ending: Ending) -> int:
    """Run torchrun, and return the exit code that ``ending`` chooses if it fails."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun gets a failed worker's error through a file in its log folder.
    with tempfile.TemporaryDirectory(prefix="ezpz-moe-") as reports, _own_signals():
        # A failure arrives as an exception with torchrun's whole report: do not print it twice.
        logging.disable(logging.ERROR)
        try:
            torchrun.run(torchrun.parse_args(["--log-dir", reports, *arguments]))
        except ChildFailedError as failure:
            return ending.failed(failure)
        except SignalException as stop:
            return ending.stopped(stop.sigval)
        finally:
            logging.disable(logging.NOTSET)
    return 0


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Take back the signals for which torchrun leaves handlers that raise, here and in forks."""
    handlers = {each: signal.getsignal(each) for each in signal.valid_signals()}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            # None is a handler that is not Python's; such cannot be set.
            if handler is not None and signal.getsignal(each) is not handler:
                signal.signal(each, handler)


def last_words(failure: ProcessFailure) -> str:
    """Return what a failed worker said: its error's last line, or its signal."""
    words = failure.message
    if isinstance(words, dict):  # an exception, as torch's ``record`` writes it
        words = words["message"]
    return words.strip().splitlines()[-1]


def _check_processes(nproc: int) -> None:
    """Allow one process per accelerator; on the CPU, any number."""
    import torch

    if torch.accelerator.is_available() and nproc > (count := torch.accelerator.device_count()):
        raise EzpzError(
            f"--nproc {nproc}: this machine has {count} {torch.accelerator.current_accelerator()} "
            f"device(s). Use --nproc {count} or fewer."
        )


def share_threads(nproc: int) -> None:
    """On the CPU, divide the threads that torch would use alone; the user's choice wins.

    torchrun would give each of several processes one thread, which suits only accelerators.
    """
    import torch

    if nproc > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // nproc)))


def _shown_ranks(degree: int, nproc: int, nnodes: int) -> str:
    """Return the local ranks to show, separated by commas.

    Always local rank 0, which reports mistakes. A pipeline's loss is on the first rank of its last
    stage, on one of the machines.
    """
    # Pipeline stages are the outermost dimension: the last one begins after all the others' ranks.
    loss_rank = nproc * nnodes // degree * (degree - 1) % nproc
    asked = os.environ.get(_SHOWN_RANKS) or str(loss_rank)
    try:
        # LOG_RANK replaces the loss's rank, but never rank 0, which reports mistakes.
        ranks = {0, *map(int, asked.split(","))}
    except ValueError:
        raise EzpzError(
            f"{_SHOWN_RANKS}={asked!r}: must be ranks separated by commas, such as 0,1."
        ) from None
    return ",".join(map(str, sorted(ranks)))


def _on_all_nodes(local_ranks: str, nproc: int, nnodes: int) -> str:
    """Count local ranks over all machines, as a comma-separated list."""
    local = [int(rank) for rank in local_ranks.split(",")]
    return ",".join(str(node * nproc + rank) for node in range(nnodes) for rank in local)
