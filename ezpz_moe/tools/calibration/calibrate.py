"""Start the ranks that measure a machine, and write its file: ``ezpz-moe plan --calibrate``."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import TypeAdapter

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.calibration.asked import Asked, asked_of
from ezpz_moe.tools.calibration.rank import Found
from ezpz_moe.tools.calibration.written import as_toml
from ezpz_moe.tools.launch import HERE, last_words, run_ranks, share_threads
from ezpz_moe.tools.nodes import Node, Placement, loss_report, meet
from ezpz_moe.tools.verify import default_device

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def calibrate(
    config: str, host_flags: list[str], path: Path, *, nproc: int, placement: Placement | None
) -> Found | None:
    """Measure this machine for a job, with a process for each rank, and write its file.

    Args:
        config: a flavor's name or the path of a job's TOML, whose sizes are measured.
        host_flags: the trainer's own flags, which override the job.
        path: the new file.
        nproc: ranks on this machine.
        placement: this machine's place among several; None if it is the only one.

    Returns:
        What was measured; None on another node than the first, which writes the file.

    Raises:
        EzpzError: the job is wrong, a rank has failed, a machine did not show up or was lost, or
            the file cannot be written.
    """
    sheet = host().planning().model_sheet(config, host_flags, is_cpu=default_device() == "cpu")
    share_threads(nproc)
    with tempfile.TemporaryDirectory(prefix="ezpz-moe-") as folder:
        result = Path(folder) / "found.json"
        _start(asked_of(sheet), result, nproc, placement)
        if not result.exists():
            return None
        found = TypeAdapter(Found).validate_json(result.read_bytes())
    text = as_toml(found, config, sheet.job.compute_bytes)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        # Not lost: a minute's measurements.
        raise EzpzError(
            f"--calibrate {path}: cannot be written: {error.strerror}. It would be:\n{text}"
        ) from None
    return found


@dataclass(frozen=True)
class _Ending:
    """What the user is told when ranks have not measured everything.

    Attributes:
        nodes: all machines; none if this is the only one.
        own_rank: this machine's place among them.
    """

    nodes: Sequence[Node] = ()
    own_rank: int = 0

    def failed(self, failure: ChildFailedError) -> NoReturn:
        said = last_words(failure.get_first_failure()[1])
        lost = loss_report(self.nodes, self.own_rank, said)
        raise EzpzError(f"--calibrate: {lost or f'a rank has failed: {said}'}") from None

    def stopped(self, by: signal.Signals) -> NoReturn:
        raise KeyboardInterrupt if by == signal.SIGINT else SystemExit(128 + by)


def _start(asked: Asked, result: Path, nproc: int, placement: Placement | None) -> None:
    where = placement.torchrun_arguments if placement else HERE
    # What ranks print goes into files (3: of both streams); their errors come as exceptions.
    command = [f"--nproc-per-node={nproc}", "--redirects=3", *where]
    command += ["--module", "ezpz_moe.tools.calibration.rank"]
    command += [TypeAdapter(Asked).dump_json(asked).decode(), str(result)]
    if placement is None:
        run_ranks(command, _Ending())
        return
    with meet(placement, nproc) as nodes:
        run_ranks(command, _Ending(nodes, placement.node_rank))
