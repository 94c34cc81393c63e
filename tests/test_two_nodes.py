"""Two machines, one of which is lost: what the other says, and that the run goes on from there.

The machines are two network namespaces of this one, joined by a veth pair, each with a host name of
its own. Taking one end of the pair down is silence, as of a machine without power: no connection is
closed. Both ends then find the other one lost, node 0 that serves the rendezvous and node 1.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from dialect import ON_0_2, SINCE_2026_08
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from trainer_runs import job_folder

from ezpz_moe.tools.planning.machine import machine

pyroute2 = pytest.importorskip("pyroute2", reason="network namespaces are Linux's")

pytestmark = [pytest.mark.train, pytest.mark.ranks]

NODES = (0, 1)
ADDRESSES = ("10.213.77.1", "10.213.77.2")
TIMEOUT = 10  # seconds; the host's own is 100
STEPS = 10
CUT_AFTER = 4
PATIENCE = 300  # seconds for anything, before it counts as a hang
SECTIONS = f"""
[checkpoint]
enable = true
interval = 3

[comm]
train_timeout_seconds = {TIMEOUT}

[parallelism]
expert_parallel_degree = 2
"""


@dataclass(frozen=True)
class Machines:
    """Two network namespaces and the wire between them."""

    names: tuple[str, str]

    def set_wire(self, state: str) -> None:
        """ "up" or "down"."""
        for name in self.names:
            with pyroute2.NetNS(name) as namespace:
                namespace.link("set", index=namespace.link_lookup(ifname="wire")[0], state=state)

    def start(self, node: int, command: list[str], log: Path) -> subprocess.Popen:
        """Start a command on one machine, with its output in ``log``."""
        inside = [
            *("nsenter", f"--net=/var/run/netns/{self.names[node]}", "unshare", "--uts"),
            *("sh", "-c", f'hostname machine{node} && exec "$@"', "sh"),
        ]
        environment = {k: v for k, v in os.environ.items() if k not in ("LOG_RANK", "MASTER_ADDR")}
        with log.open("w") as output:
            return subprocess.Popen(
                inside + command,
                cwd=log.parent,
                env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdout=output,
                stderr=subprocess.STDOUT,
            )


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    names = tuple(f"ezpz-moe-{os.getpid()}-{node}" for node in NODES)
    with contextlib.ExitStack() as clean_up:
        try:
            for name in names:
                pyroute2.netns.create(name)
                clean_up.callback(pyroute2.netns.remove, name)
        except PermissionError as reason:
            pytest.skip(f"needs the right to make network namespaces, as root has it: {reason}")
        _join(*names)
        yield Machines(names)


def _join(name: str, other: str) -> None:
    with pyroute2.NetNS(name) as first, pyroute2.NetNS(other) as second:
        peer = {"ifname": "wire", "net_ns_fd": other}
        first.link("add", ifname="wire", kind="veth", peer=peer)
        for namespace, address in zip((first, second), ADDRESSES, strict=True):
            (wire,) = namespace.link_lookup(ifname="wire")
            namespace.addr("add", index=wire, address=address, prefixlen=24)
            for link in (*namespace.link_lookup(ifname="lo"), wire):
                namespace.link("set", index=link, state="up")


@dataclass(frozen=True)
class Run:
    """What both nodes of a run said."""

    exit_codes: list[int]
    logs: list[str]

    def steps(self, node: int) -> dict[int, tuple[str, str]]:
        """step -> loss and gradient norm, as printed."""
        plain = re.sub(r"\x1b\[[\d;]*m", "", self.logs[node])
        found = re.findall(r"step:\s+(\d+)\s+loss:\s+(\S+)\s+grad_norm:\s+(\S+)", plain)
        return {int(step): (loss, norm) for step, loss, norm in found}


def on_node(node: int, command: str) -> list[str]:
    """A command for the job, as it is started on one machine of both."""
    return [
        *(sys.executable, "-m", "ezpz_moe.cli", command, "job.toml", "--nnodes", "2"),
        *("--node-rank", str(node), "--master-addr", ADDRESSES[0]),
    ]


def train(machines: Machines, folder: Path, *, cut_after: int | None = None) -> Run:
    """The same line on both machines, in one folder; the wire is cut after a step."""
    machines.set_wire("up")
    logs = [folder / f"node{node}.log" for node in NODES]
    with contextlib.ExitStack() as clean_up:
        nodes = []
        for node in NODES:
            command = [*on_node(node, "train"), "--training.steps", str(STEPS)]
            nodes.append(machines.start(node, command, logs[node]))
            clean_up.callback(_end_tree, nodes[-1])
        if cut_after is not None:
            _wait_for(f"step: {cut_after:2}", logs, nodes)
            machines.set_wire("down")
        exit_codes = [node.wait(PATIENCE) for node in nodes]
    return Run(exit_codes, [log.read_text() for log in logs])


def _wait_for(text: str, logs: list[Path], nodes: list[subprocess.Popen]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not all(text in log.read_text() for log in logs):
        said = "\n".join(log.read_text()[-3000:] for log in logs)
        assert time.monotonic() < give_up, said
        assert all(node.poll() is None for node in nodes), said
        time.sleep(0.1)


def _end_tree(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


@pytest.fixture(scope="module")
def undisturbed(machines, tmp_path_factory) -> tuple[Run, Path]:
    folder = _folder(tmp_path_factory.mktemp("undisturbed"))
    return train(machines, folder), folder


@pytest.fixture(scope="module")
def cut(machines, tmp_path_factory) -> tuple[Run, Path]:
    folder = _folder(tmp_path_factory.mktemp("cut"))
    return train(machines, folder, cut_after=CUT_AFTER), folder


@pytest.fixture(scope="module")
def resumed(machines, cut) -> tuple[Run, Path]:
    folder = shutil.copytree(cut[1], cut[1].with_name("resumed"))
    return train(machines, folder), folder


def _folder(folder: Path) -> Path:
    job = job_folder(folder) / "job.toml"
    job.write_text(job.read_text() + SECTIONS)
    return folder


@pytest.mark.full
def test_two_machines_train_with_experts_on_both(undisturbed):
    run, _ = undisturbed
    assert run.exit_codes == [0, 0], run.logs
    for node in NODES:
        assert "dp_shard=2, cp=1, tp=1, ep=2" in run.logs[node]
        assert list(run.steps(node)) == list(range(1, STEPS + 1))
        assert "lost node" not in run.logs[node]
    assert run.steps(0) == run.steps(1)
    losses = [float(loss) for loss, _ in run.steps(0).values()]
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize(("node", "lost"), [(0, 1), (1, 0)])
def test_the_node_that_is_left_says_which_one_was_lost_and_after_what_time(cut, node, lost):
    """Whether the lost one serves the rendezvous or not; in three lines, at the end."""
    run, folder = cut
    assert run.exit_codes[node] == 1
    who, noticed, go_on = run.logs[node].splitlines()[-3:]
    assert who == (
        f"ezpz-moe: error: lost node {lost} (machine{lost}, {ADDRESSES[lost]}, rank {lost}): "
        "it does not answer, so it is down or cut off."
    )
    assert noticed.startswith("This node noticed by: RuntimeError: ")
    assert f"Timed out waiting {TIMEOUT * 1000}ms" in noticed
    assert go_on == (
        "To continue, run the same command again on every node: it resumes from "
        f"outputs/checkpoint/step-{_last_checkpoint(folder)}."
    )
    assert "Root Cause (first observed failure)" not in run.logs[node]


def _last_checkpoint(folder: Path) -> int:
    """Step of the last one that was whole before the wire was cut."""
    whole = folder.glob("outputs/checkpoint/step-*/.metadata")
    return max(int(file.parent.name.removeprefix("step-")) for file in whole)


@pytest.mark.full
def test_the_resumed_run_continues_from_the_last_checkpoint(cut, resumed, undisturbed):
    """With the losses and gradient norms that it would have had."""
    run, _ = resumed
    assert run.exit_codes == [0, 0], run.logs
    first = _last_checkpoint(cut[1]) + 1
    for node in NODES:
        assert run.steps(node) == {
            step: undisturbed[0].steps(node)[step] for step in range(first, STEPS + 1)
        }


@pytest.mark.full
def test_the_resumed_run_ends_with_the_same_bits(resumed, undisturbed, tmp_path):
    weights = [_weights(folder, tmp_path / "weights") for _, folder in (resumed, undisturbed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def _weights(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(folder / "outputs" / "checkpoint" / f"step-{STEPS}", scratch)
    return torch.load(scratch)


@pytest.mark.full
@pytest.mark.skipif(ON_0_2 or SINCE_2026_08, reason="torchtitan 0.3 is planned for")
def test_two_machines_calibrate_and_node_0_writes_what_links_them(machines, tmp_path):
    folder = _folder(tmp_path)
    machines.set_wire("up")
    logs = [folder / f"node{node}.log" for node in NODES]
    with contextlib.ExitStack() as clean_up:
        nodes = []
        for node in NODES:
            command = [*on_node(node, "plan"), "--calibrate", f"node{node}.toml"]
            nodes.append(machines.start(node, command, logs[node]))
            clean_up.callback(_end_tree, nodes[-1])
        exit_codes = [node.wait(PATIENCE) for node in nodes]
    assert exit_codes == [0, 0], [log.read_text() for log in logs]
    assert not (folder / "node1.toml").exists()
    on = machine(str(folder / "node0.toml"))
    assert on.ranks_per_node == 1
    assert {(each.tier, each.ranks) for each in on.collectives} == {("network", 2)}
