"""Fine-tune a small model on a second text, with ``[train_only]`` and without.

    python benchmarks/fine_tune.py
    python benchmarks/fine_tune.py --steps 20 --fine-tune-steps 10 --seeds 42 --out /tmp/fine_tune

The model learns Python's documentation, and goes on from there with the source of Python's own
modules in each of ``WAYS``, everything else the same. A tenth of each text, in whole topics and
whole modules, is held out; the losses are those of ``ezpz-moe analyze`` on it. Which experts are
the second text's is attributed on what is trained, by ``ezpz-moe analyze --attribute``.

A step is timed in runs of their own, of all ways at once, so that what else the machine does slows
them alike: the median of what its process got of a CPU, without the first steps, which allocate.
Run it in one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tyro
from debug_runs import LoggedStep, train
from methods import PLAIN, SEQ_LEN, SEQUENCES
from torch.distributed.checkpoint import FileSystemReader

from ezpz_moe import cli
from ezpz_moe.cli import display
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.config.train_only import TrainOnly, train_only_of
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.tools.bench.plan import environment

# Ten experts, so that one of each layer is a tenth.
FLAVOR = f'{PLAIN}num_experts = 10\nexpert_precision = "float32"\n'
EXPERTS = 10
BEFORE = "before"
EVERYTHING = "everything"
WAYS = {
    EVERYTHING: "",
    "all experts": '[train_only]\nexperts = "all"\n',
    "gates alone": "[train_only]\nrouter = true\n",
    # No layer's most frequent expert has less than that of the tokens: it is one of each layer.
    "the attributed tenth": '[train_only]\nexperts = "../attribution.json"\nshare = 0.1\n',
}
TIMED_STEPS = 22
HELD_OUT = 10
"""One in so many documents."""


@dataclass(frozen=True)
class Arguments:
    """Fine-tune with everything, all experts, gates or a tenth of the experts learning."""

    steps: int = 150
    """On the first text."""
    fine_tune_steps: int = 50
    """On the second text."""
    seeds: tuple[int, ...] = (42, 43)
    learning_rate: float = 2e-3
    evaluated: int = 32
    """Sequences of each held-out text."""
    out: Path = Path("outputs/fine_tune")
    """Where the runs are kept; one of as many steps that is there already is not repeated."""
    json: Path | None = None
    """Write every step's loss, and the table, to this file."""


@dataclass(frozen=True)
class Tuned:
    """One way, from one seed. Losses are those on what was held out of each text."""

    first_loss: float
    second_loss: float
    trained_share: float
    losses: list[float]


# --- texts ----------------------------------------------------------------------------------------


def write_texts(folder: Path) -> None:
    """Write ``first`` and ``second``, and ``first_held_out`` and ``second_held_out``, as .jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    library = sorted(Path(os.__file__).parent.glob("*.py"))
    modules = [module.read_text(encoding="utf-8") for module in library]
    # A paragraph is a document, and so is what two blank lines keep apart in a module.
    _write(folder, "first", [topic.split("\n\n") for topic in topics.values()])
    _write(folder, "second", [module.split("\n\n\n") for module in modules])


def _write(folder: Path, name: str, documents: Sequence[Sequence[str]]) -> None:
    for file, some in (
        (f"{name}_held_out", documents[::HELD_OUT]),
        (name, [each for number, each in enumerate(documents) if number % HELD_OUT]),
    ):
        parts = [part for document in some for part in document if part.strip()]
        random.Random(0).shuffle(parts)  # or a run would see a few topics alone
        lines = [json.dumps({"text": part}) for part in parts]
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n")


# --- runs -----------------------------------------------------------------------------------------


def tuned_from(seed: int, arguments: Arguments) -> dict[str, Tuned]:
    """Train from one seed on the first text, and on the second in each way."""
    folder = arguments.out / f"seed_{seed}"
    write_texts(folder)
    before, steps = folder / BEFORE, arguments.steps
    flags = _flags(folder, "first", seed, steps, arguments.learning_rate)
    logged = train({"tuned": FLAVOR}, before, steps, flags=flags)
    checkpoint = before / "checkpoint" / f"step-{steps}"
    _analyze(checkpoint, folder, "", arguments.evaluated, folder / "attribution.json")
    found = {BEFORE: _tuned(before, steps, logged, arguments)}
    flags, steps = _flags_after(folder, seed, arguments), arguments.fine_tune_steps
    for name, table in WAYS.items():
        way = folder / _in_path(name)
        logged = train({"tuned": FLAVOR}, way, steps, flags=flags, tables=table)
        found[name] = _tuned(way, steps, logged, arguments)
    return found


def step_seconds(arguments: Arguments) -> dict[str, float]:
    """The median of the seconds of a CPU that a step takes, by way: all of them train at once."""
    seed = arguments.seeds[0]
    folder = arguments.out / f"seed_{seed}"
    flags = _flags_after(folder, seed, arguments)

    def timed(name: str) -> float:
        way = folder / f"timed_{_in_path(name)}"
        logged = train({"tuned": FLAVOR}, way, TIMED_STEPS, flags=flags, tables=WAYS[name])
        # A median: what is imported late falls into one step.
        return statistics.median(
            step.cpu_seconds - before.cpu_seconds for before, step in pairwise(logged[1:])
        )

    with ThreadPoolExecutor(len(WAYS)) as all_at_once:
        return dict(zip(WAYS, all_at_once.map(timed, WAYS), strict=True))


def _in_path(name: str) -> str:
    return name.replace(" ", "_")


def _flags_after(folder: Path, seed: int, arguments: Arguments) -> list[str]:
    """Flags that go on with the second text."""
    steps, rate = arguments.fine_tune_steps, arguments.learning_rate
    before = folder / BEFORE / "checkpoint" / f"step-{arguments.steps}"
    flags = _flags(folder, "second", seed, steps, rate)
    return [*flags, "--checkpoint.initial-load-path", str(before)]


def _flags(folder: Path, text: str, seed: int, steps: int, rate: float) -> list[str]:
    """Flags that train on a text, and save once."""
    flags = ["--training.local-batch-size", str(SEQUENCES), "--training.seq-len", str(SEQ_LEN)]
    flags += ["--training.mixed-precision-param", "float32", "--debug.seed", str(seed)]
    flags += ["--optimizer.param-groups.0.optimizer-kwargs.lr", str(rate)]
    flags += ["--dataloader.dataset", "text_file"]
    flags += ["--dataloader.dataset-path", str((folder / f"{text}.jsonl").absolute())]
    return [*flags, "--checkpoint.enable", "--checkpoint.interval", str(steps)]


def _tuned(run: Path, steps: int, logged: Sequence[LoggedStep], arguments: Arguments) -> Tuned:
    checkpoint, found = run / "checkpoint" / f"step-{steps}", run / "found.json"
    of = _analyze(checkpoint, run.parent, "_held_out", arguments.evaluated, found)
    job = load_job(str(run / "job.toml"))
    return Tuned(
        of["against_loss"],
        of["loss"],
        0.0 if run.name == BEFORE else trained_share(checkpoint, run, train_only_of(job)),
        [step.loss for step in logged],
    )


def _analyze(
    checkpoint: Path, folder: Path, which: str, sequences: int, out: Path
) -> Mapping[str, Any]:
    """What ``ezpz-moe analyze --attribute`` finds of the second text, against the first.

    What it has found of this checkpoint before is not sought again.
    """
    if out.exists() and out.stat().st_mtime > (checkpoint / ".metadata").stat().st_mtime:
        found = json.loads(out.read_text())
        if found["sequences"] == sequences:
            return found
    words = ["analyze", str(checkpoint), "--config", str(folder / BEFORE / "job.toml")]
    words += ["--attribute", str(folder / f"second{which}.jsonl")]
    words += ["--against", str(folder / f"first{which}.jsonl"), "--out", str(out)]
    words += ["--sequences", str(sequences), "--seq-len", str(SEQ_LEN)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = cli.main(words)
    if code:
        raise SystemExit(f"{shlex.join(words)}: exit code {code}\n{said.getvalue()}")
    return json.loads(out.read_text())


def trained_share(checkpoint: Path, flavors: Path, said: TrainOnly | None) -> float:
    """Parameters that learn, of all; of a layer's stacks the rows of the experts that do."""
    if said is None:
        return 1.0
    entries = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    learn = 0.0
    for name, entry in entries.items():
        if not name.startswith("layers."):
            continue
        if ".inner_experts.w" in name:
            layer = int(name.split(".")[1])
            experts = EXPERTS if said.experts is None else len(said.experts.get(layer, ()))
            learn += entry.size.numel() * experts / EXPERTS
        elif name.endswith("router.gate.weight") and said.router:
            learn += entry.size.numel()
    return learn / host().summarize(load_flavor("tuned", near=flavors)).total


# --- the table ------------------------------------------------------------------------------------


def row(
    name: str, of_seeds: Sequence[Mapping[str, Tuned]], seconds: Mapping[str, float]
) -> dict[str, str]:
    found = [each[name] for each in of_seeds]

    def each_and_change(key: str) -> str:
        loss = statistics.fmean(getattr(each, key) for each in found)
        if name == BEFORE:
            return f"{loss:.3f}"
        changes = [getattr(of[name], key) - getattr(of[BEFORE], key) for of in of_seeds]
        return f"{loss:.3f} ({', '.join(f'{change:+.3f}' for change in changes)})"

    is_before = name == BEFORE
    return {
        "what learns": name,
        "of the parameters": "-" if is_before else f"{found[0].trained_share:.2%}",
        "loss, first text": each_and_change("first_loss"),
        "loss, second text": each_and_change("second_loss"),
        "speed of a step": "-" if is_before else f"{seconds[EVERYTHING] / seconds[name]:.2f}",
    }


def archive(
    of_seeds: Sequence[Mapping[str, Tuned]],
    seconds: Mapping[str, float],
    rows: Sequence[Mapping[str, str]],
    told: Arguments,
) -> dict[str, Any]:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "environment": {
            **environment("cpu"),
            "load_average_at_the_end": [round(load, 1) for load in os.getloadavg()],
        },
        "steps": [told.steps, told.fine_tune_steps],
        "tokens_of_a_step": SEQUENCES * SEQ_LEN,
        "learning_rate": told.learning_rate,
        "cpu_seconds_of_a_step": dict(seconds),
        "table": list(rows),
        "runs": {
            str(seed): {name: asdict(tuned) for name, tuned in found.items()}
            for seed, found in zip(told.seeds, of_seeds, strict=True)
        },
    }


def main(arguments: Arguments) -> None:
    check_host()
    of_seeds = [tuned_from(seed, arguments) for seed in arguments.seeds]
    seconds = step_seconds(arguments)
    rows = [row(name, of_seeds, seconds) for name in (BEFORE, *WAYS)]
    steps = f"{arguments.steps} steps, then {arguments.fine_tune_steps}"
    display.print_table(rows, title=f"{steps}; seeds {', '.join(map(str, arguments.seeds))}")
    if arguments.json:
        found = archive(of_seeds, seconds, rows, arguments)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
