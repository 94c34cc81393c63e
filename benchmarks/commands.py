"""Commands of ``ezpz-moe`` in a folder, for the scripts beside this one that train with ranks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_TPS = re.compile(r"tps: *([\d,]+)")


def ezpz_moe(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder. One that fails ends the script."""
    command = [sys.executable, "-m", "ezpz_moe.cli", *arguments]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    return done


def tokens_per_second(trained: subprocess.CompletedProcess[str]) -> list[float]:
    """Return what the trainer says of each step; ranks that show their log all say the same."""
    said = _TPS.findall(trained.stdout + trained.stderr)
    return [float(found.replace(",", "")) for found in said]
