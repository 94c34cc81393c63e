"""Whole training steps with routed layers as one node, beside the stock trainer's.

    python benchmarks/routed_step.py
    python benchmarks/routed_step.py --models qwen3_debugmodel --turns 5 --json step.json
    python benchmarks/routed_step.py --memory --modes none

Each figure is of runs of the host's own trainer, torchtitan 0.3, each in a process of its own:
with ``grouped_mm`` and the host's own checkpointing policy, which is the stock trainer's path, and
with a backend of ours. Processes take turns. All keep the memory that they free, as ``ezpz-moe
train`` has it, so that the allocator is not among the causes.

A step is forward, backward, clipping and optimizer. Peak memory is what a step needs beyond
weights, gradients and optimizer states, which all exist before it: the highest sum of what torch
allocates and frees on the way, by its profiler. Activations have their own: that of forward and
backward, because what the optimizer allocates has the size of the weights. With ``--memory``
nothing is timed: it says of what that peak is made, and the most that each kind has at any time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from step_memory import composition
from torch.profiler import ProfilerActivity, profile

from ezpz_moe.cli import display

HERE = Path(__file__).resolve().parents[1]
JOB = HERE / "flavors" / "jobs" / "debug_cpu.toml"
STOCK = "grouped_mm"
# The embedded tokenizer's vocabulary: the full one would take most of the step.
MODELS = {
    "qwen3_debugmodel": 'inherits = "qwen3_debugmodel"',
    "10B_2B_scaled": (
        'inherits = "10B_2B"\nvocab_size = 2048\nn_layers = 4\ndim = 1024\n'
        "dense_hidden_dim = 4096\nmoe_hidden_dim = 704"
    ),
    "500M_scaled": 'inherits = "500M"\nvocab_size = 2048\nn_layers = 4',
}
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
_WARM_UP = 2  # steps
_ONE = "--one"
"""What the script starts itself with, for one process."""

Mode = Literal["none", "selective"]


class Run(NamedTuple):
    """One process."""

    model: str
    backend: str
    mode: Mode
    measured: Literal["time", "memory", "composition"]
    steps: int
    sequences: int


@dataclass(frozen=True)
class Arguments:
    """Time whole training steps, and weigh them, beside the stock trainer's."""

    models: tuple[str, ...] = tuple(MODELS)
    modes: tuple[Mode, ...] = ("none", "selective")
    backend: str = "for_loop"
    turns: int = 3
    """Pairs of processes."""
    steps: int = 10
    """Of each process that is timed; the first two do not count."""
    sequences: int = 4
    """Of 128 tokens, in a step."""
    memory: bool = False
    """Only say what the memory of a step is made of."""
    json: Path | None = None
    """Write every value to this file."""


def main(arguments: Arguments) -> None:
    found: dict[str, Any] = {}
    for model in arguments.models:
        for mode in arguments.modes:
            name = f"{model}, {mode}"
            if arguments.memory:
                found[name] = composed(model, mode, arguments)
                display.print_table(kinds(found[name]), title=f"{name}: MiB")
                continue
            found[name] = compared(model, mode, arguments)
            display.print_table(rows(found), title=f"{arguments.backend} beside {STOCK}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def compared(model: str, mode: Mode, arguments: Arguments) -> dict[str, dict[str, list[Any]]]:
    """Return the seconds of each turn, and the bytes of one, of the stock trainer and of ours."""
    backends = {"stock": STOCK, "ours": arguments.backend}
    values: dict[str, dict[str, list[Any]]] = {
        "seconds": {who: [] for who in backends},
        "bytes": {},
    }
    for _ in range(arguments.turns):
        for who, backend in backends.items():
            seconds = started(
                Run(model, backend, mode, "time", arguments.steps, arguments.sequences)
            )
            values["seconds"][who].append(statistics.median(seconds[_WARM_UP:]))
    for who, backend in backends.items():
        weighed = Run(model, backend, mode, "memory", 3, arguments.sequences)
        values["bytes"][who] = started(weighed)[_WARM_UP:]
    return values


def composed(model: str, mode: Mode, arguments: Arguments) -> dict[str, Any]:
    """Return what the last of three steps is made of, of the stock trainer's and of ours."""
    backends = {"stock": STOCK, "ours": arguments.backend}
    return {
        who: started(Run(model, backend, mode, "composition", 3, arguments.sequences))[_WARM_UP]
        for who, backend in backends.items()
    }


def kinds(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    columns = {
        f"{who}, {when}": values for who, of_one in found.items() for when, values in of_one.items()
    }
    for kind in {kind: None for values in columns.values() for kind in values}:
        sizes = {column: values.get(kind, 0) / 2**20 for column, values in columns.items()}
        yield {"kind": kind} | {column: f"{size:.0f}" for column, size in sizes.items()}


def rows(found: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    for name, values in found.items():
        seconds, peaks = values["seconds"], values["bytes"]
        pairs = zip(seconds["stock"], seconds["ours"], strict=True)
        of_stock, of_ours = (
            [max(phase) / 2**20 for phase in zip(*peaks[who], strict=True)]
            for who in ("stock", "ours")
        )
        yield {
            "model, checkpointing": name,
            "stock s": f"{statistics.median(seconds['stock']):.3f}",
            "ours s": f"{statistics.median(seconds['ours']):.3f}",
            "speed": f"{statistics.median(stock / ours for stock, ours in pairs):.3f}",
            "stock MiB": f"{of_stock[0]:.0f}",
            "ours MiB": f"{of_ours[0]:.0f}",
            "activations": f"{of_ours[0] / of_stock[0]:.3f}",
            "whole step": f"{of_ours[1] / of_stock[1]:.3f}",
        }


def started(run: Run) -> list[Any]:
    """Return what the run measures, from a process of its own."""
    command = [sys.executable, __file__, _ONE, json.dumps(run)]
    environment = {**os.environ, **KEPT, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own ----------------------------------------------------------------------


def values_of(run: Run) -> list[Any]:
    """Return of every step the seconds, the bytes at its two peaks, or those of each kind."""
    values: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(run, Path(folder))
        keep_gradients(trainer)
        one_step = trainer.train_step

        def measured_step(batches: Any) -> None:
            if run.measured == "memory":
                values.append(peaks_in_bytes(lambda: one_step(batches)))
                return
            if run.measured == "composition":
                peak, highest = composition(lambda: one_step(batches))
                values.append({"at the peak": peak, "highest": highest})
                return
            start = time.perf_counter()
            one_step(batches)
            values.append(time.perf_counter() - start)

        trainer.train_step = measured_step
        trainer.train()
        trainer.close()
    return values


def build_trainer(run: Run, folder: Path) -> Any:
    """Return the host's trainer for the debug job, alone in this process."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    from ezpz_moe.hosts.detect import check_host

    check_host()
    from torchtitan.config import ConfigManager

    (folder / "timed.toml").write_text(MODELS[run.model])
    text = JOB.read_text().replace("debugmodel_sdpa_for_loop", f"timed_sdpa_{run.backend}")
    mode = f'mode = "{run.mode}"'
    if run.mode == "selective" and run.backend == STOCK:
        mode += '\nexperts = "recompute"'  # what the host's policy does
    text = text.replace('mode = "none"', mode)
    text = text.replace("local_batch_size = 4", f"local_batch_size = {run.sequences}")
    (folder / "job.toml").write_text(text)
    arguments = ["--module", "ezpz_moe", "--config", str(folder / "job.toml")]
    arguments += ["--training.steps", str(run.steps), "--dump-folder", str(folder / "dump")]
    return ConfigManager().parse_args(arguments).build()


def keep_gradients(trainer: Any) -> None:
    """Have gradients from the start, set to zero and not freed: they are no activations."""
    parameters = [each for part in trainer.model_parts for each in part.parameters()]

    def zero_grad(*_: Any, **__: Any) -> None:
        for each in parameters:
            if each.grad is not None:
                each.grad.zero_()

    trainer.optimizers.zero_grad = zero_grad


def peaks_in_bytes(step: Callable[[], object]) -> tuple[int, int]:
    """Return the highest sum of the bytes that torch has allocated since the step began.

    Returns:
        Before the optimizer steps, and in the whole step.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = sorted(found.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    # The trainer's container is an optimizer too, around those of its parts.
    optimizer = next(each for each in events if each.name().startswith("Optimizer.step#"))
    changes = [(each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"]
    before = [number for when, number in changes if when < optimizer.start_ns()]
    whole = [number for _, number in changes]
    return max(accumulate(before, initial=0)), max(accumulate(whole, initial=0))


if __name__ == "__main__":
    if sys.argv[1:2] == [_ONE]:
        print(json.dumps(values_of(Run(*json.loads(sys.argv[2])))))
    else:
        main(tyro.cli(Arguments))
