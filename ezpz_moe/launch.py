"""Start the trainer: torchrun on this machine, around ``python -m ezpz_moe.train``.

The arguments are those of the host's own ``run_train.sh``. For several machines, start
``torchrun ... -m ezpz_moe.train --module ezpz_moe --config CONFIG`` yourself (with torchtitan 0.2
``--job.config_file CONFIG``).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile

from ezpz_moe.errors import EXIT_CODE, EzpzError
from ezpz_moe.hosts import presumed_generation
from ezpz_moe.job import Job, find_job

_PIPELINE_DEGREE = "parallelism.pipeline_parallel_degree"
_SHOWN_RANKS = "LOG_RANK"  # the host's own variable


def train(config: str, host_flags: list[str], *, nproc: int = 1) -> int:
    """Train ``config`` with ``nproc`` processes on this machine and wait for them.

    The workers' output comes through live; of several ranks, rank 0 is shown, those in
    ``LOG_RANK``, and the one that has a pipeline's loss.

    Args:
        config: a flavor's name or the path of a job's TOML.
        host_flags: the trainer's own flags, which override the job.
        nproc: processes, one per accelerator.

    Returns:
        An exit code: 0, 2 for a mistake of the user's that a worker has already reported, 1 for
        any other failure (after torchrun's report), 128 + n when signal n ended the run.

    Raises:
        EzpzError: ``config`` or ``nproc`` is wrong. Nothing has been started then.
    """
    # Before torch is imported: most mistakes cost no waiting.
    job = find_job(config)
    command = presumed_generation().slot("command")

    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _check_processes(nproc)
    _share_threads(nproc)
    shown = _shown_ranks(pipeline_degree(job, host_flags), nproc)
    os.environ[_SHOWN_RANKS] = shown  # the trainer warns when the loss is on a hidden rank
    with tempfile.TemporaryDirectory(prefix="ezpz-moe-") as reports:
        arguments = ["--standalone", "--nproc-per-node", str(nproc), "--log-dir", reports]
        arguments += ["--local-ranks-filter", shown]
        if "," in shown:
            arguments += ["--role", "rank", "--tee", "3"]  # "[rank0]:" before each line
        arguments += ["--module", "ezpz_moe.train", *command.arguments(job)]
        # A failure comes back as an exception that holds torchrun's whole report: print it once.
        logging.disable(logging.ERROR)
        try:
            torchrun.run(torchrun.parse_args(arguments + host_flags))
        except ChildFailedError as failure:
            if any(worker.exitcode == EXIT_CODE for worker in failure.failures.values()):
                return EXIT_CODE
            print(failure, file=sys.stderr, flush=True)
            return 1
        except SignalException as stop:
            print(f"ezpz-moe: stopped by {stop.sigval.name}", file=sys.stderr, flush=True)
            return 128 + stop.sigval
        finally:
            logging.disable(logging.NOTSET)
    return 0


def _check_processes(nproc: int) -> None:
    """One process per accelerator; on the CPU any number."""
    import torch

    if nproc < 1:
        raise EzpzError(f"--nproc {nproc}: at least one process is needed.")
    if torch.accelerator.is_available() and nproc > (count := torch.accelerator.device_count()):
        raise EzpzError(
            f"--nproc {nproc}: this machine has {count} {torch.accelerator.current_accelerator()} "
            f"device(s). Use --nproc {count} or fewer."
        )


def _share_threads(nproc: int) -> None:
    """On the CPU, share out the threads that torch would use alone; the user's choice stands.

    torchrun would give each of several processes one thread, as is right beside an accelerator.
    """
    import torch

    if nproc > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // nproc)))


def pipeline_degree(job: Job, host_flags: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    dashes = _PIPELINE_DEGREE.replace("_", "-")
    parser.add_argument(
        f"--{_PIPELINE_DEGREE}",
        f"--{dashes}",
        dest="degree",
        type=int,
        default=job.values.get(_PIPELINE_DEGREE, 1),
    )
    return max(1, parser.parse_known_args(host_flags)[0].degree)


def _shown_ranks(degree: int, nproc: int) -> str:
    """Comma-separated local ranks whose output is shown.

    Rank 0 always: it reports mistakes. The loss of a pipeline is on the first rank of its last
    stage.
    """
    loss_rank = nproc // degree * (degree - 1)
    asked = os.environ.get(_SHOWN_RANKS) or str(loss_rank)
    try:
        ranks = {0, *map(int, asked.split(","))}
    except ValueError:
        raise EzpzError(
            f"{_SHOWN_RANKS}={asked!r}: ranks separated by commas, such as 0,1."
        ) from None
    return ",".join(map(str, sorted(ranks)))
