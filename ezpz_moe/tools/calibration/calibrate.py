"""Start the ranks that measure a machine, and write its file: ``ezpz-moe plan --calibrate``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from pydantic import TypeAdapter

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.calibration.asked import Asked, asked_of
from ezpz_moe.tools.calibration.rank import Found
from ezpz_moe.tools.calibration.written import as_toml
from ezpz_moe.tools.launch import HERE, share_threads
from ezpz_moe.tools.nodes import Placement
from ezpz_moe.tools.verify import default_device


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
        EzpzError: the job is wrong, a rank has failed, or the file cannot be written.
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


def _start(asked: Asked, result: Path, nproc: int, placement: Placement | None) -> None:
    where = placement.torchrun_arguments if placement else HERE
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", *where]
    command += ["--module", "ezpz_moe.tools.calibration.rank"]
    command += [TypeAdapter(Asked).dump_json(asked).decode(), str(result)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()
        said = next((line for line in reversed(last) if "Error" in line), last[-1] if last else "")
        raise EzpzError(f"--calibrate: a rank has failed with exit code {done.returncode}: {said}")
