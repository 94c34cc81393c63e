"""Runs scenarios of the real trainer in real processes, and compares their records."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from ezpz_moe.hosts import TITAN_MAIN, generation

HERE = Path(__file__).parent
TINY = HERE / "data" / "tiny"

Record = dict
Scenarios = Mapping[str, list[str]]


def job_folder(folder: Path) -> Path:
    """``folder`` with the tests' job and its flavor in it."""
    return Path(shutil.copytree(TINY, folder, dirs_exist_ok=True))


def door_1(folder: Path, flavor: str, *flags: str, checkpointing: str = "none") -> list[str]:
    """Arguments that train the tests' job in ``folder`` with another flavor of its model."""
    job = folder / f"{flavor}.{checkpointing}.toml"
    text = (folder / "job.toml").read_text()
    text = text.replace('flavor = "tiny_sdpa"', f'flavor = "{flavor}"')
    job.write_text(text.replace('mode = "none"', f'mode = "{checkpointing}"'))
    return ["--module", "ezpz_moe", "--config", str(job), *flags]


def batch(*, size: int | None = None, seq_len: int | None = None, whole: int | None = None):
    """Flags of the installed host for these sizes of the job: what the keys become there.

    ``size`` without ``seq_len`` is of the tests' job, whose sequences have 128 tokens.
    """
    if generation() is not TITAN_MAIN:
        sizes = {"local-batch-size": size, "seq-len": seq_len, "global-batch-size": whole}
    else:
        length = seq_len or 128
        sizes = {
            "num-tokens-per-microbatch-per-dp-rank": size and size * length,
            "max-context-length": seq_len,
            "num-tokens-per-train-step": whole and whole * length,
        }
    flags = [(f"--training.{name}", str(value)) for name, value in sizes.items() if value]
    return [part for flag in flags for part in flag]


def train(
    scenarios: Scenarios, folder: Path, *, ranks: int, titan_0_2: Path | None = None
) -> dict[str, list[Record]]:
    """Train every scenario with ``ranks`` processes over gloo: name -> one record per rank.

    The host is the installed one, or the torchtitan 0.2 in the folder ``titan_0_2``.
    """
    dump_folder = "--job.dump-folder" if titan_0_2 else "--dump-folder"
    (folder / "scenarios.json").write_text(json.dumps(_prepared(scenarios, folder, dump_folder)))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), str(HERE / "run_trainer.py")),
        *(str(folder / "scenarios.json"), str(folder / "records")),
    ]
    result = subprocess.run(
        command,
        # One thread: the same sums on every machine.
        env={**(with_host(titan_0_2) if titan_0_2 else os.environ), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return {
        name: [torch.load(folder / f"records.{name}.{rank}") for rank in range(ranks)]
        for name in scenarios
    }


def with_host(folder: Path) -> dict[str, str]:
    """The environment in which the torchtitan in ``folder`` is the installed one."""
    paths = [str(folder), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _prepared(
    scenarios: Scenarios, folder: Path, dump_folder: str
) -> dict[str, tuple[int, list[str]]]:
    """Each scenario with a port where its ranks meet, and a dump folder unless it names one."""
    ports = _free_ports(len(scenarios))
    return {
        name: (port, [dump_folder, str(folder / name), *arguments])
        for port, (name, arguments) in zip(ports, scenarios.items(), strict=True)
    }


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


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
