"""Start the trainer: torchrun on this machine, around ``python -m ezpz_moe.train``.

The arguments are those of the host's own ``run_train.sh``. With several machines, each starts its
own torchrun, and if one is lost the others say which (:mod:`ezpz_moe.tools.nodes`).
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

from ezpz_moe.errors import EXIT_CODE, EzpzError
from ezpz_moe.hosts.detect import presumed_host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.tools.nodes import Placement, loss_report, meet
from ezpz_moe.tools.trainer_settings import last_checkpoint, pipeline_degree

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_SHOWN_RANKS = "LOG_RANK"  # the host's own variable


Tell = Callable[[str], None]
"""Takes what the user must know about how the run ended."""


def train(
    config: str,
    host_flags: list[str],
    *,
    tell: Tell,
    nproc: int = 1,
    placement: Placement | None = None,
) -> int:
    """Train ``config`` with ``nproc`` processes on this machine and wait for them.

    The workers' output appears live. Of several ranks on this machine, it shows the first one,
    those in ``LOG_RANK``, and the one that has a pipeline's loss.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        tell: takes torchrun's report of a failure, or that of the node that was lost.
        nproc: processes on this machine, one per accelerator.
        placement: this machine's place among several; None if it is the only one.

    Returns:
        An exit code: 0; 2 for a user's mistake that a worker has already reported; 1 for any other
            failure, whose report ``tell`` was given; 128 + n when signal n ended the run.

    Raises:
        EzpzError: ``config``, ``nproc`` or ``placement`` is wrong, or a machine did not show up.
            Nothing has been started then.
    """
    # Check before importing torch: most mistakes then show without a wait.
    job = find_job(config)
    arguments = presumed_host().arguments(job) + host_flags
    _check_processes(nproc)
    _share_threads(nproc)
    nnodes = placement.nnodes if placement else 1
    shown = _shown_ranks(pipeline_degree(job, host_flags), nproc, nnodes)
    # The trainer counts ranks over all machines, and warns if the loss is on a hidden one.
    os.environ[_SHOWN_RANKS] = _on_all_nodes(shown, nproc, nnodes)
    if placement is None:
        # By default torchrun uses this machine's name; where that cannot be resolved, it waits
        # long.
        here = ["--standalone", "--local-addr", "localhost"]
        return _run(here, arguments, nproc, shown, str, tell)
    with meet(placement, nproc) as nodes:
        # A surviving worker's own error says only that a communication timed out.
        def lost(failure: ChildFailedError) -> str:
            """Return which node was lost and how to continue; torchrun's own report if none was."""
            report = loss_report(nodes, placement.node_rank, _last_words(failure))
            if report is None:
                return str(failure)
            checkpoint = last_checkpoint(job, host_flags)
            return f"ezpz-moe: error: {report}\n{_how_to_go_on(checkpoint)}"

        return _run(placement.torchrun_arguments, arguments, nproc, shown, lost, tell)


def _run(
    where: list[str],
    trainer_arguments: list[str],
    nproc: int,
    shown: str,
    report: Callable[[ChildFailedError], str],
    tell: Tell,
) -> int:
    """Run torchrun, and let ``report`` decide what to tell about a failure."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun gets a failed worker's error through a file in its log folder.
    with tempfile.TemporaryDirectory(prefix="ezpz-moe-") as reports:
        arguments = [*where, "--nproc-per-node", str(nproc), "--log-dir", reports]
        arguments += ["--local-ranks-filter", shown]
        if "," in shown:
            arguments += ["--role", "rank", "--tee", "3"]  # "[rank0]:" before each line
        arguments += ["--module", "ezpz_moe.train", *trainer_arguments]
        # A failure arrives as an exception with torchrun's whole report: do not print it twice.
        logging.disable(logging.ERROR)
        try:
            torchrun.run(torchrun.parse_args(arguments))
        except ChildFailedError as failure:
            # exit_on_user_error() has printed the message in the worker.
            if any(worker.exitcode == EXIT_CODE for worker in failure.failures.values()):
                return EXIT_CODE
            tell(report(failure))
            return 1
        except SignalException as stop:
            tell(f"ezpz-moe: stopped by {stop.sigval.name}")
            # The shell's convention for a process that a signal has ended.
            return 128 + stop.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _last_words(failure: ChildFailedError) -> str:
    """Return what the first worker to fail said: its error's last line, or its signal."""
    words = failure.get_first_failure()[1].message
    if isinstance(words, dict):  # an exception, as torch's ``record`` writes it
        words = words["message"]
    return words.strip().splitlines()[-1]


def _how_to_go_on(checkpoint: Path | None) -> str:
    again = "To continue, run the same command again on every node"
    if checkpoint is None:
        return f"{again}. There is no checkpoint to resume from: it begins at step 1."
    if not checkpoint.is_dir():
        return f"{again}, without checkpoint.load_step: it names {checkpoint}, which is missing."
    return f"{again}: it resumes from {checkpoint}."


def _check_processes(nproc: int) -> None:
    """Allow one process per accelerator; on the CPU, any number."""
    import torch

    if nproc < 1:
        raise EzpzError(f"--nproc {nproc}: must be at least 1 process.")
    if torch.accelerator.is_available() and nproc > (count := torch.accelerator.device_count()):
        raise EzpzError(
            f"--nproc {nproc}: this machine has {count} {torch.accelerator.current_accelerator()} "
            f"device(s). Use --nproc {count} or fewer."
        )


def _share_threads(nproc: int) -> None:
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
