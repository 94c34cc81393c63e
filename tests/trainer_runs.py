"""Runs scenarios of the real trainer in real processes, and compares their records."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import IO

import dialect
import fork_server
import torch

HERE = Path(__file__).parent
TINY = HERE / "data" / "tiny"
LOG = "log.txt"
PATIENCE = 600
"""Seconds for a run, before it counts as a hang."""
EP_2 = [
    *("--parallelism.expert-parallel-degree", "2"),
    *("--parallelism.spmd-backend", "partial_dtensor"),
]
TYPED_TP_2 = ["--parallelism.tensor-parallel-degree", "2", "--debug.spmd-typechecking"]
AOT = ["--compile.enable", "--compile.backend", "aot_eager"]
SAME_SEQUENCES = ["--same-sequences", "--training.global-batch-size", "4"]
"""Every run trains on the same ones, however many ranks share them."""

BACKENDS: tuple[str, ...] = ("for_loop", "batched_mm_padded")
WITH_OPTIONS: dict[str, str] = {}
"""Of backends with options, what follows ``tiny_sdpa_`` in their flavors' names."""
if not dialect.ON_0_2:  # which hands the same tensors to the same operators
    BACKENDS += ("grouped_mm_fused",)
    WITH_OPTIONS |= {
        "capacity": "batched_mm_capacity(capacity_factor=8)",
        "recompute": "for_loop(recompute=true)",
        "choice": "auto(among='for_loop')",
    }
COMPUTED_BY = {**{name: name for name in BACKENDS}, **WITH_OPTIONS}
"""The end of a flavor's name -> its ``compute_backend``."""

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
"""Processes on this machine, whose own name need not lead anywhere."""

Record = dict
Scenarios = Mapping[str, list[str]]


def job_folder(folder: Path) -> Path:
    """``folder`` with the tests' job and its flavor in it, in the tests' precision."""
    folder = Path(shutil.copytree(TINY, folder, dirs_exist_ok=True))
    _, dtype = dialect.precision("tiny")
    job = folder / "job.toml"
    text = job.read_text()
    job.write_text(text.replace('_precision_param = "float32"', f'_precision_param = "{dtype}"'))
    return folder


def door_1(folder: Path, flavor: str, *flags: str, checkpointing: str = "none") -> list[str]:
    """Arguments that train the tests' job in ``folder`` with another flavor of its model."""
    path = folder / f"{flavor}.{checkpointing}.toml"
    text = (folder / "job.toml").read_text()
    text = text.replace('flavor = "tiny_sdpa"', f'flavor = "{flavor}"')
    path.write_text(text.replace('mode = "none"', f'mode = "{checkpointing}"'))
    return dialect.job(path, *flags)


def composed(folder: Path, backend: str) -> str:
    """The end of a flavor's name in ``folder``: the backend's, with composed routed layers."""
    like = f'inherits = "tiny_sdpa_{backend}"'
    if backend not in WITH_OPTIONS:
        like = f'inherits = "tiny"\nattention = "sdpa"\ncompute_backend = "{backend}"'
    (folder / f"tiny_sdpa_composed_{backend}.toml").write_text(f'{like}\nrouted = "composed"\n')
    return f"composed_{backend}"


def at_once(sequences: int) -> list[str]:
    """The flag for this many sequences in a microbatch."""
    return ["--training.local-batch-size", str(sequences)]


def train(
    scenarios: Scenarios, folder: Path, *, ranks: int, python: str = sys.executable
) -> dict[str, list[Record]]:
    """Train every scenario with ``ranks`` processes over gloo: name -> one record per rank.

    With another host's ``python`` each scenario names its dump folder itself. What the processes
    said is in ``folder / LOG``.
    """
    with (folder / LOG).open("w+") as log:
        for name, arguments in scenarios.items():
            out = folder / f"records.{name}"
            command = [fork_server.python(python), str(HERE / "run_trainer.py"), str(out)]
            command += _dumped(folder / name, arguments)
            codes = _codes_of_ranks(command, ranks, folder, log)
            if any(codes):
                log.seek(0)
                raise AssertionError(f"scenario {name!r}: {codes}\n{log.read()[-8000:]}")
    return {
        name: [torch.load(folder / f"records.{name}.{rank}") for rank in range(ranks)]
        for name in scenarios
    }


class Runs:
    """Runs by name, each trained when it is first asked for: no test pays for another's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Hashable, tuple[list[str], int]] = {}
        self._records: dict[Hashable, list[Record]] = {}

    def add(self, key: Hashable, arguments: list[str], *, ranks: int = 1) -> None:
        """Say how ``key`` is trained."""
        self._known[key] = arguments, ranks

    def __getitem__(self, key: Hashable) -> list[Record]:
        """One record per rank."""
        if key not in self._records:
            arguments, ranks = self._known[key]
            name = key if isinstance(key, str) else " ".join(map(str, key))
            self._records[key] = train({name: arguments}, self._folder, ranks=ranks)[name]
        return self._records[key]


class OneRank(Runs):
    """:class:`Runs` of one process each, with its record alone."""

    def __getitem__(self, key: Hashable) -> Record:
        (record,) = super().__getitem__(key)
        return record


def _codes_of_ranks(command: list[str], ranks: int, folder: Path, log: IO[str]) -> list[int]:
    """Exit codes of ``ranks`` processes; when one fails or none ends, all are ended."""
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **of_rank(rank, ranks, folder)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    give_up = time.monotonic() + PATIENCE
    while None in (codes := [each.poll() for each in running]):
        if any(codes) or time.monotonic() > give_up:
            for each in running:
                each.kill()
        time.sleep(0.01)
    return codes


def of_rank(rank: int, ranks: int, folder: Path) -> dict[str, str]:
    """The variables that torchrun would set for one of the processes, and those of our tests."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "OMP_NUM_THREADS": "1",  # the same sums on every machine
        "EZPZ_MOE_CACHE": str(folder / "cache"),
        "EZPZ_MOE_NATIVE_DTYPES": "float32,bfloat16",  # the same kernels on every machine
    }


def _dumped(folder: Path, arguments: list[str]) -> list[str]:
    """``arguments`` with a dump folder, unless they name one."""
    named = {"--dump-folder", "--job.dump-folder"} & set(arguments)
    return arguments if named else [dialect.DUMP_FOLDER, str(folder), *arguments]


def telemetry(folder: Path, name: str) -> list[dict]:
    """The lines that a scenario has written."""
    lines = (folder / name / "telemetry.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_bits(run: Record, other: Record) -> None:
    """Losses, gradient norms and every parameter at the end are the same."""
    assert run["losses"] == other["losses"]
    assert run["gradient_norms"] == other["gradient_norms"]
    assert run["parameters"] == other["parameters"]


def assert_within_twice(tensors, yardstick, *, of) -> None:
    """``tensors`` differ from ``of`` by at most twice what ``yardstick`` does."""
    allowed = compare_gradients(yardstick, of)
    for name, difference in compare_gradients(tensors, of).items():
        assert difference <= 2 * allowed[name] + 1e-6, name


def compare_gradients(
    gradients: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """``|a - b| / |b|`` in the Frobenius norm, for every parameter."""
    assert gradients.keys() == others.keys()
    return {name: _relative_difference(gradients[name], others[name]) for name in others}


def _relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    scale = torch.linalg.vector_norm(b.double())
    return (torch.linalg.vector_norm(a.double() - b.double()) / scale.clamp_min(1e-30)).item()
