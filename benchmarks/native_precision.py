"""What the rule for CPUs without bfloat16 instructions is worth: this build against an older one.

    python benchmarks/native_precision.py --against REVISION

The expert layer (E, D, F, R) = (64, 512, 256, 8192), balanced, forward and backward in bfloat16, by
``for_loop``: milliseconds, and the peak of the process's memory. Then steps of the debug model as
each build trains it here when a job says nothing of precision. Builds take turns, each measurement
in a process of its own; medians, and their ratio. Runs on Linux, and wants an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
EXPERTS, DIM, HIDDEN, ROWS = 64, 512, 256, 8192
_TPS = re.compile(r"tps: *([\d,]+)")


def measure_layer() -> dict[str, float]:
    """Of the build that this process imports: milliseconds and MiB."""
    import torch

    from ezpz_moe.compute import get_backend
    from ezpz_moe.compute.reference import random_case, run

    ffn = get_backend("for_loop").ffn
    small = random_case([2, 2], dim=32, hidden_dim=32, dtype=torch.bfloat16)
    run(ffn, small)  # loads what only the first call loads
    case = random_case(
        [ROWS // EXPERTS] * EXPERTS, dim=DIM, hidden_dim=HIDDEN, dtype=torch.bfloat16
    )
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak
    start = time.perf_counter()
    run(ffn, case)
    return {"ms": (time.perf_counter() - start) * 1e3, "peak MiB": _peak_mebibytes()}


def _peak_mebibytes() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].removesuffix("kB")) / 1024


def seconds_of_steps(build: Path, steps: int) -> list[float]:
    """Of a training run of the main job's model, without the first step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "ezpz_moe.cli",
            "train",
            str(HERE / "flavors/jobs/debug_cpu.toml"),
        ]
        flags = [
            "--training.steps",
            str(steps),
            "--training.local-batch-size",
            "8",
            "--dump-folder",
            folder,
        ]
        said = _run(build, [*command, *flags])
    tokens = 8 * 128
    return [tokens / float(tps.replace(",", "")) for tps in _TPS.findall(said)[1:]]


def _run(build: Path, command: list[str]) -> str:
    environment = {**os.environ, "PYTHONPATH": str(build), "NO_COLOR": "1"}
    done = subprocess.run(command, env=environment, cwd=build, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def _unpacked(revision: str, folder: Path) -> Path:
    archive = subprocess.run(
        ["git", "archive", revision, "ezpz_moe", "flavors"],
        cwd=HERE,
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", default="HEAD", help="a revision of this repository")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each training run")
    parser.add_argument("--layer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layer:
        print(json.dumps(measure_layer()))
        return
    with tempfile.TemporaryDirectory() as folder:
        builds = {"before": _unpacked(arguments.against, Path(folder)), "now": HERE}
        layers: dict[str, list[dict[str, float]]] = {name: [] for name in builds}
        steps: dict[str, list[float]] = {name: [] for name in builds}
        for _ in range(arguments.turns):
            for name, build in builds.items():
                said = _run(build, [sys.executable, __file__, "--layer"])
                layers[name].append(json.loads(said.splitlines()[-1]))
        for name, build in builds.items():
            steps[name] += seconds_of_steps(build, arguments.steps)
    for what in ("ms", "peak MiB"):
        before, now = (statistics.median(each[what] for each in layers[name]) for name in builds)
        print(f"layer, {what}: {before:.1f} before, {now:.1f} now, {before / now:.2f} to 1")
    before, now = (statistics.median(steps[name]) for name in builds)
    print(f"debug step, s: {before:.2f} before, {now:.2f} now, {before / now:.1f} to 1")


if __name__ == "__main__":
    main()
