"""Count how many tokens the late steps of a run send to other experts, with averaged scores.

    python benchmarks/rerouting.py
    python benchmarks/rerouting.py --steps 40 --only none 0.5 --out /tmp/rerouting

The small model of ``methods.py`` learns the embedded text, without and with
``[router.similarity]``, from one seed and from another. ``ezpz-moe analyze`` then runs two
checkpoints, of the last step and of three quarters of the run, on the same tokens of that text: the
share of tokens whose set of experts is another (*rerouted*), and how alike neighbouring tokens'
experts are (SRP), as means over layers.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import tyro
from debug_runs import train
from methods import PLAIN, SEQ_LEN, SEQUENCES

from ezpz_moe.cli import display
from ezpz_moe.tools.bench.plan import environment

# By a loss, as in the paper: a selection bias moves all tokens with like scores at once.
BALANCE = '[balance]\nbias_update = "none"\naux_loss = 0.01\n'
AVERAGED = "[router.similarity]\nstrength = {}\n"
FLAVORS = {
    "none": "",
    "0.5": AVERAGED.format(0.5),
    "1.0": AVERAGED.format(1.0),
    "none, second seed": "",
    "0.5, second seed": AVERAGED.format(0.5),
}
"""By strength."""


@dataclass(frozen=True)
class Arguments:
    """Train a small model with and without averaged scores, and count rerouted tokens."""

    steps: int = 200
    only: tuple[str, ...] = tuple(FLAVORS)
    """Of the strengths."""
    out: Path = Path("outputs/rerouting")
    """Where the runs are kept; one of as many steps that is there already is not repeated."""
    json: Path | None = None
    """Write the table to this file."""


def analyzed(folder: Path, steps: int) -> dict:
    """What ``ezpz-moe analyze`` says of a run's two checkpoints, from the folder if it is there."""
    found = folder / f"found.{steps}.json"
    if found.exists():
        return json.loads(found.read_text())
    text = folder / "text.txt"
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)[:20]))
    last, before = (folder / "checkpoint" / f"step-{step}" for step in (steps, steps * 3 // 4))
    command = [sys.executable, "-m", "ezpz_moe.cli", "analyze", str(last), "--config"]
    command += [str(folder / "job.toml"), "--data", str(text), "--against", str(before)]
    command += ["--sequences", "32", "--seq-len", str(SEQ_LEN), "--out", str(found)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(found.read_text())


def row(name: str, folder: Path, steps: int) -> dict[str, str]:
    flags = ["--training.local-batch-size", str(SEQUENCES), "--training.seq-len", str(SEQ_LEN)]
    flags += ["--debug.seed", "43" if "second seed" in name else "42", "--checkpoint.enable"]
    flags += ["--checkpoint.keep-latest-k", "0"]
    flags += ["--checkpoint.interval", str(steps // 4)]
    logged = train({"tried": PLAIN + BALANCE + FLAVORS[name]}, folder, steps, flags=flags)
    layers = analyzed(folder, steps)["layers"]
    rerouted = [each["drift"]["changed"] for each in layers]
    return {
        "strength": name,
        "rerouted": f"{statistics.fmean(rerouted):.3f}",
        "by layer": ", ".join(f"{share:.2f}" for share in rerouted),
        "SRP": f"{statistics.fmean(each['srp'] for each in layers):.3f}",
        "loss": f"{statistics.fmean(step.loss for step in logged[-steps // 10 :]):.3f}",
    }


def main(arguments: Arguments) -> None:
    rows = [
        row(name, arguments.out / name.replace(", ", "_").replace(" ", "_"), arguments.steps)
        for name in arguments.only
    ]
    display.print_table(rows, title=f"{arguments.steps} steps")
    if arguments.json:
        found = {
            "command": shlex.join(["python", *sys.argv]),
            "environment": environment("cpu"),
            "steps": arguments.steps,
            "table": rows,
        }
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
