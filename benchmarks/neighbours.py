"""Train a small model that routes by ReLU with and without BlockFFN's losses, and analyze each.

    python benchmarks/neighbours.py
    python benchmarks/neighbours.py --steps 20 --only none chunk_loss --out /tmp/neighbours

The model of ``methods.py`` learns the embedded text from one seed with each of ``LOSSES``, and
``ezpz-moe analyze`` tells of its last checkpoint how many experts a token uses (of 8) and whether
neighbours use the same: SRP of 16 tokens, and SCH of a cache of as many experts as a token uses
and of twice as many. All are means over the layers.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tyro
from debug_runs import LoggedStep, train
from methods import PLAIN, RELU, SEQ_LEN, SEQUENCES

from ezpz_moe.cli import display
from ezpz_moe.tools.bench.plan import environment

LOSSES = {
    "none": "",
    "locality_loss": "locality_loss = 0.01\n",
    "chunk_loss": "chunk_loss = 0.5\nchunk = 16\n",
    "both": "locality_loss = 0.01\nchunk_loss = 0.5\nchunk = 16\n",
}
CACHES = (1, 2)
"""Of a segment, in multiples of the experts that a token uses."""


@dataclass(frozen=True)
class Arguments:
    """Train with BlockFFN's losses and without, and analyze what neighbouring tokens use."""

    steps: int = 100
    only: tuple[str, ...] = tuple(LOSSES)
    """Of the losses."""
    out: Path = Path("outputs/neighbours")
    """Where the runs are kept; one of as many steps that is there already is not repeated."""
    json: Path | None = None
    """Write the table to this file."""


def trained(name: str, folder: Path, steps: int) -> list[LoggedStep]:
    flavor = f"{PLAIN}{RELU}[balance]\n{LOSSES[name]}[telemetry]\nimages = false\n"
    flags = ["--training.local-batch-size", str(SEQUENCES), "--training.seq-len", str(SEQ_LEN)]
    flags += ["--checkpoint.enable", "--checkpoint.interval", str(steps), "--debug.seed", "42"]
    return train({"tried": flavor}, folder, steps, flags=flags)


def analyzed(folder: Path, cache: int) -> list[dict[str, Any]]:
    """What ``ezpz-moe analyze`` finds of the layers."""
    text, found = folder / "text.txt", folder / f"found_{cache}.json"
    text.write_text("\n\n".join(topics.values()))
    command = [sys.executable, "-m", "ezpz_moe.cli", "analyze", str(folder)]
    command += ["--config", str(folder / "job.toml"), "--data", str(text), "--out", str(found)]
    command += ["--seq-len", str(SEQ_LEN), "--sequences", "32", "--cache", str(cache)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(found.read_text())["layers"]


def row(name: str, folder: Path, steps: int) -> dict[str, str]:
    losses = [step.loss for step in trained(name, folder, steps)]
    by_cache = [analyzed(folder, cache) for cache in CACHES]

    def mean(key: str, layers: list[dict[str, Any]]) -> str:
        return f"{statistics.fmean(layer[key] for layer in layers):.3f}"

    return {
        "losses": name,
        "loss": f"{statistics.fmean(losses[-max(1, steps // 10) :]):.3f}",
        "experts of a token": mean("top_k", by_cache[0]),
        "SRP(16)": mean("srp", by_cache[0]),
        **{f"SCH(16, {n}k)": mean("sch", of) for n, of in zip(CACHES, by_cache, strict=True)},
    }


def main(arguments: Arguments) -> None:
    rows = [row(name, arguments.out / name, arguments.steps) for name in arguments.only]
    display.print_table(rows, title=f"{arguments.steps} steps")
    if arguments.json:
        found = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": {
                **environment("cpu"),
                "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
            },
            "steps": arguments.steps,
            "tokens_of_a_step": SEQUENCES * SEQ_LEN,
            "table": rows,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
