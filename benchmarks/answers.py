"""How long commands that need no model take to answer, and mistakes to be told: CPU seconds.

    python benchmarks/answers.py                       this checkout
    python benchmarks/answers.py --before main         beside a git revision of it
    python benchmarks/answers.py --before /path/to/another/checkout --only train --rounds 5

CPU seconds are user and system of the process and all that it started, as the median of the rounds,
in which the checkouts take turns: unlike seconds on a clock they say the same beside other work. A
row is marked where it misses its goal, and the exit code is 1 then. The first run of a checkout
compiles its modules and is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ezpz_moe.telemetry.json_lines import FILE_NAME, append
from ezpz_moe.telemetry.record import LayerRecord, StepRecord

ROOT = Path(__file__).parent.parent
ANSWER, MISTAKE, DOCTOR = 1.5, 2.0, 8.0
"""Goals in CPU seconds: a command without a model, a mistake in the text, ``doctor``."""


HEAVY = (
    "datasets",
    "matplotlib",
    "numpy",
    "pandas",
    "pyarrow",
    "safetensors",
    "scipy",
    "sympy",
    "tokenizers",
    "torch",
    "torchtitan",
    "transformers",
    "triton",
)
"""Modules whose import a user waits for."""
_DRAWING = ("matplotlib", "numpy")


@dataclass(frozen=True)
class Case:
    """A command line.

    Attributes:
        line: what follows ``ezpz-moe``.
        goal: CPU seconds that it may take.
        code: its exit code; None if that depends on the machine.
        imports: which of :data:`HEAVY` it needs; tests hold that it imports nothing else of them.
    """

    line: str
    goal: float
    code: int | None = 0
    imports: tuple[str, ...] = ()


CASES = (
    Case("--version", ANSWER),
    Case("--help", ANSWER),
    Case("train --help", ANSWER),
    Case("flavors", ANSWER),
    Case("show 16B", ANSWER),
    Case("show job.toml", ANSWER),
    Case("show 16B --all", ANSWER, imports=HEAVY),
    Case("show watched.toml", ANSWER, imports=HEAVY),
    Case("convert --from hf config.json", ANSWER, imports=HEAVY),
    Case("ckpt inspect step-1", ANSWER),
    Case("convert old.toml", ANSWER),
    Case("convert --lint script.sh", ANSWER, 1),
    Case("plot run", ANSWER, imports=_DRAWING),
    # Mistakes that the text shows.
    Case("flavours", MISTAKE, 2),
    Case("show 16X", MISTAKE, 2),
    Case("show misspelt.toml", MISTAKE, 2),
    Case("show absent.toml", MISTAKE, 2),
    Case("show huge.toml", MISTAKE, 2),
    Case("show undivided.toml", MISTAKE, 2),
    Case("describe 16X", MISTAKE, 2),
    Case("describe huge.toml", MISTAKE, 2),
    Case("doctor misspelt.toml", MISTAKE, 2),
    Case("preflight misspelt.toml --world-size 2", MISTAKE, 2),
    Case("train misspelt.toml", MISTAKE, 2),
    Case("train absent.toml", MISTAKE, 2),
    Case("train huge.toml", MISTAKE, 2),
    Case("train job.toml --training.step 5", MISTAKE, 2),
    Case("train job.toml --training.steps five", MISTAKE, 2),
    Case("train job.toml --nprocs 2", MISTAKE, 2),
    Case("train job.toml --nproc 0", MISTAKE, 2),
    Case("train job.toml extra", MISTAKE, 2),
    Case("train debugmodel", MISTAKE, None),
    Case("preflight huge.toml --world-size 2", MISTAKE, 2),
    Case("tune misspelt.toml", MISTAKE, 2),
    Case("preflight job.toml --world-size 2 --training.step 5", MISTAKE, 2),
    Case("analyze misspelt.toml --data script.sh", MISTAKE, 2),
    Case("upcycle absent 16B out", MISTAKE, 2),
    Case("upcycle step-1 16X out", MISTAKE, 2),
    Case("ckpt inspect absent", MISTAKE, 2),
    Case("ckpt remap absent out --to 0.3", MISTAKE, 2),
    Case("ckpt remap step-1 out --to hf", MISTAKE, 2),
    Case("ckpt remap step-1 out --to hf --model 16X", MISTAKE, 2),
    Case("convert absent.toml", MISTAKE, 2),
    Case("convert --from hf absent.json", MISTAKE, 2),
    Case("convert --lint absent.sh", MISTAKE, 2),
    Case("plot absent", MISTAKE, 2),
    Case("verify --dtype float8", MISTAKE, 2),
    Case("bench --backends for_lop", MISTAKE, 2),
    Case("backends --device cup", MISTAKE, 2),
    Case("doctor", DOCTOR, None, HEAVY),
    Case("doctor job.toml", DOCTOR, None, HEAVY),
)

_JOB = """[model]
name = "ezpz_moe"
flavor = "debugmodel_sdpa_for_loop"
[training]
steps = 3
"""
_FILES = {
    "job.toml": _JOB,
    "watched.toml": f'{_JOB}[telemetry]\ndetail = "brief"\n',
    "config.json": (ROOT / "tests" / "data" / "reader" / "config.json").read_text(),
    "undivided.toml": f"{_JOB}[parallelism]\nexpert_parallel_degree = 3\n",
    "misspelt.toml": _JOB.replace("steps", "step"),
    "huge.toml": _JOB.replace("steps = 3", f"local_batch_size = {2**40}"),
    "old.toml": _JOB.replace('"ezpz_moe"', '"deepseek_v3"').replace(
        "debugmodel_sdpa_for_loop", "16B"
    ),
    "script.sh": "torchrun -m torchtitan.train --training.steps 3 --training.step 4\n",
}


@dataclass
class Checkout:
    """A checkout, and what its runs took.

    Attributes:
        name: in the table's head.
        folder: its root.
    """

    name: str
    folder: Path

    def seconds(self, case: Case, scratch: Path) -> tuple[float, int]:
        """Run a case in ``scratch``; return CPU seconds and the exit code."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ezpz_moe.cli", *case.line.split()],
            cwd=scratch,
            env={**os.environ, "PYTHONPATH": str(self.folder), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Not getrusage(), which adds up all children that have ever ended.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return used.ru_utime + used.ru_stime, process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", metavar="REVISION|DIR", help="compare with this checkout")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases that contain this text")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the median counts")
    told = parser.parse_args()
    cases = [case for case in CASES if told.only in case.line]
    with tempfile.TemporaryDirectory() as folder, _before(told.before) as before:
        scratch = Path(folder)
        write_files(scratch)
        write_checkpoint(scratch / "step-1")
        checkouts = [*before, Checkout("now", ROOT)]
        print("| `ezpz-moe ...` | goal |", *(f" {each.name} |" for each in checkouts), sep="")
        print("|---|--:|", *("--:|" for _ in checkouts), sep="")
        met = [_print_row(case, checkouts, scratch, told.rounds) for case in cases]
        return int(not all(met))


def write_files(scratch: Path) -> None:
    """Write what the cases name, but for the checkpoint: jobs, a script, a run's telemetry."""
    for name, text in _FILES.items():
        (scratch / name).write_text(text)
    _write_telemetry(scratch / "run")


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint with the names of torchtitan 0.3, and a step as a run saves it."""
    import torch
    from torch.distributed.checkpoint import FileSystemWriter, save

    names = ("w1_EFD", "w2_EDF", "w3_EFD")
    experts = "layers.1.moe.routed_experts.inner_experts"
    state = {f"{experts}.{name}": torch.ones(5, 4, 4) for name in names}
    state["train_state"] = {"step": 1}
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)


def _print_row(case: Case, checkouts: list[Checkout], scratch: Path, rounds: int) -> bool:
    """Print the medians of a case; return whether this checkout meets its goal."""
    taken: list[list[float]] = [[] for _ in checkouts]
    for turn in range(rounds + 1):
        for checkout, seconds in zip(checkouts, taken, strict=True):
            spent, code = checkout.seconds(case, scratch)
            if case.code not in (None, code) and checkout.name == "now":
                raise SystemExit(f"{case.line}: ended with {code}, not with {case.code}.")
            if turn:
                seconds.append(spent)
    medians = [statistics.median(seconds) for seconds in taken]
    is_met = medians[-1] <= case.goal
    shown = (f" {median:.2f} |" for median in medians)
    print(
        f"| `{case.line}` | {case.goal:g} |",
        *shown,
        "" if is_met else " missed",
        sep="",
        flush=True,
    )
    return is_met


def _write_telemetry(folder: Path) -> None:
    """Write what a run of 20 steps with one MoE layer records."""
    layer = LayerRecord(
        layer=1,
        tokens=100,
        counts_E=(25,) * 8,
        zero_counts_Z=(),
        top1_probability=0.2,
        margin=0.1,
        bias_norm=None,
        losses={"aux_loss": 1.0},
        scaled_losses={"aux_loss": 0.01},
        padding_waste=None,
        drop_rate=None,
    )
    for step in range(1, 21):
        record = StepRecord(
            step, 1, loss=8 / step, grad_norm=1.0, backend="for_loop", layers=(layer,)
        )
        append(folder / FILE_NAME, record)


@contextlib.contextmanager
def _before(named: str | None) -> Iterator[list[Checkout]]:
    """Yield the checkout to compare with, if one was named; a revision is checked out for now."""
    if named is None:
        yield []
    elif Path(named, "ezpz_moe").is_dir():
        yield [Checkout("before", Path(named).resolve())]
    else:
        folder = tempfile.mkdtemp(prefix="ezpz-moe-before-")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, named], check=True)
        try:
            yield [Checkout("before", Path(folder))]
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


if __name__ == "__main__":
    sys.exit(main())
