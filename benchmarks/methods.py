"""Train a small model with each of the methods of docs/guides/methods.md, and compare them.

    python benchmarks/methods.py
    python benchmarks/methods.py --steps 20 --only plain pyramid --out /tmp/methods

Each flavor of ``METHODS`` learns the embedded text with the trainer, from one seed and in the same
order; ``plain`` does so from a second seed too, which shows what of a difference is chance. Loss
and load are means over the last tenth of the steps, the load over layers as well. Speeds are those
of the machine while it did this: measure them again, alone, before you quote them.

What leaves a rank under expert parallelism 2 is computed from shapes, for choices that are uniform:
a token goes to the other rank if an expert of its is there, and comes back, in forward and in
backward, in bfloat16; with it go its K choices and scores, 12 K bytes, and the scores' gradient.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from debug_runs import train

from ezpz_moe.cli import display
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.model_summary import ModelSummary
from ezpz_moe.telemetry.figures import coefficient_of_variation
from ezpz_moe.telemetry.json_lines import FILE_NAME, read
from ezpz_moe.tools.bench.plan import environment

# The debug model at half its width and with four layers, so that all runs take minutes.
PLAIN = """inherits = "debugmodel"
attention = "sdpa"
compute_backend = "for_loop"
dim = 128
n_layers = 4
n_heads = 4
dense_hidden_dim = 512
moe_hidden_dim = 128
"""
RELU = """[router]
routing = "relu"
activation = "relu_rmsnorm"
learned_scale = true
"""
METHODS = {
    "plain": "",
    "plain, second seed": "",
    "pyramid": "num_experts = { first = 4, last = 12 }\n",
    "every second layer": "moe_layers = { every = 2 }\n",
    "relu2": 'expert_activation = "relu2"\n',
    "geglu": 'expert_activation = "geglu"\n',
    "expert_bias": "expert_bias = true\n",
    "shared_gate": "shared_gate = true\n",
    "latent": "moe_latent_dim = 64\n",
    "scores before": 'router_scores = "before"\n',
    "similarity": "[router.similarity]\nstrength = 0.5\n",
    "gating_residual": "[router]\ngating_residual = true\n",
    "relu": RELU,
    "relu, both losses": f"{RELU}[balance]\nlocality_loss = 0.001\nchunk_loss = 0.02\n",
    "dense, equal FLOPs": 'dense_baseline_of = "plain"\n',
}
SEQUENCES, SEQ_LEN = 2, 128
_RANKS = 2
_BYTES, _ID, _SCORE = 2, 8, 4  # of a bfloat16, an int64, a float32


@dataclass(frozen=True)
class Arguments:
    """Train a small model with each method, and compare loss, load and what is exchanged."""

    steps: int = 200
    only: tuple[str, ...] = tuple(METHODS)
    """Of the methods."""
    out: Path = Path("outputs/methods")
    """Where the runs are kept; one of as many steps that is there already is not repeated."""
    json: Path | None = None
    """Write every step's loss, and the table, to this file."""


@dataclass(frozen=True)
class Run:
    """One method's run. Load is None for a dense model, and so is what is exchanged."""

    flavor: str
    model: ModelSummary
    losses: list[float]
    load_cv: float | None
    tokens_per_second: float
    exchanged_bytes: float | None


def run_of(name: str, folder: Path, steps: int) -> Run:
    is_dense = METHODS[name].startswith("dense_baseline_of")
    telemetry = "" if is_dense else "[telemetry]\nimages = false\n"
    text = METHODS[name] if is_dense else PLAIN + METHODS[name] + telemetry
    flags = ["--training.local-batch-size", str(SEQUENCES), "--training.seq-len", str(SEQ_LEN)]
    flags += ["--debug.seed", "43" if "second seed" in name else "42"]
    # Only the dense model names another flavor.
    flavors = {"tried": text} | ({"plain": PLAIN} if is_dense else {})
    logged = train(flavors, folder, steps, flags=flags)
    tried = load_flavor("tried", near=folder)
    model = host().summarize(tried)
    width = tried.moe_latent_dim or model.dim
    return Run(
        text,
        model,
        [step.loss for step in logged],
        None if is_dense else load_cv(folder / FILE_NAME),
        statistics.median(step.tokens_per_second for step in logged),
        None
        if is_dense
        else exchanged_bytes(model, width, layers_with_experts(folder / FILE_NAME)),
    )


def load_cv(telemetry: Path) -> float:
    """The coefficient of variation of an expert's tokens, over layers and the last steps."""
    records = read(telemetry)
    last = records[-max(1, len(records) // 10) :]
    return statistics.fmean(
        coefficient_of_variation(layer.counts_E) for record in last for layer in record.layers
    )


def layers_with_experts(telemetry: Path) -> int:
    return len(read(telemetry)[-1].layers)


def exchanged_bytes(model: ModelSummary, width: int, layers: int) -> float:
    """What leaves one rank of two in a step of ``SEQUENCES`` on each, for uniform choices.

    ``width``: of a row that is sent, the model's dimension or that of a latent.
    """
    experts = _each(model.num_experts, layers)
    chosen = _each(model.top_k, layers)
    bytes_of_a_token = sum(
        # Whether any of its k experts is on the other rank; then there and back, twice.
        (1 - math.comb(e - e // _RANKS, k) / math.comb(e, k))
        * (4 * width * _BYTES + k * (_ID + 2 * _SCORE))
        for e, k in zip(experts, chosen, strict=True)
    )
    return bytes_of_a_token * SEQUENCES * SEQ_LEN


def _each(size: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,) * layers


def row(name: str, run: Run) -> dict[str, str]:
    last = run.losses[-max(1, len(run.losses) // 10) :]
    exchanged = run.exchanged_bytes
    return {
        "method": name,
        "total": display.count(run.model.total),
        "active": display.count(run.model.active),
        "loss": f"{statistics.fmean(last):.3f}",
        "load CV": "-" if run.load_cv is None else f"{run.load_cv:.3f}",
        "EP 2, MiB a step": "-" if exchanged is None else f"{exchanged / 2**20:.2f}",
        "tokens / s": f"{run.tokens_per_second:.0f}",
    }


def archive(runs: dict[str, Run], rows: list[dict[str, str]], steps: int) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {
            **environment("cpu"),
            # Above the number of threads other work ran too, and speeds are none of the methods'.
            "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
        },
        "steps": steps,
        "tokens_of_a_step": SEQUENCES * SEQ_LEN,
        "table": rows,
        "runs": {name: asdict(run) for name, run in runs.items()},
    }


def main(arguments: Arguments) -> None:
    check_host()
    runs = {
        name: run_of(name, arguments.out / name.replace(" ", "_"), arguments.steps)
        for name in arguments.only
    }
    rows = [row(name, run) for name, run in runs.items()]
    display.print_table(rows, title=f"{arguments.steps} steps")
    if arguments.json:
        found = archive(runs, rows, arguments.steps)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
