"""The machines of one run: they meet before torchrun starts, and know later which one was lost.

torchrun, gloo and NCCL notice that a machine is silent, but they do not say which: "Timed out
waiting 10000ms for send operation". So every node keeps a port open while it runs and tells the
others where. After a failure the survivors knock at all ports. Nothing is sent in between.

The meeting point is torchrun's own: the TCPStore that node 0 serves at ``--master-addr``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import psutil

from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SECONDS_TO_MEET = 600  # torchrun's own patience with nodes that start late
SECONDS_TO_ANSWER = 5  # Linux asks three times in them: at 0, 1 and 3 seconds
_KEY = "ezpz_moe/node/{}"

State = Literal["answers", "ended", "silent"]


@dataclass(frozen=True)
class Placement:
    """This machine's place among those of a run, in torchrun's words.

    Attributes:
        nnodes: number of machines.
        node_rank: which one this is, from 0.
        master_addr: host name or address of node 0, as the others reach it.
        master_port: a free port there.
    """

    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int

    def __post_init__(self) -> None:
        if self.nnodes < 1:
            raise EzpzError(f"--nnodes {self.nnodes}: at least one machine is needed.")
        if not 0 <= self.node_rank < self.nnodes:
            raise EzpzError(
                f"--node-rank {self.node_rank}: --nnodes {self.nnodes} has the nodes 0 to "
                f"{self.nnodes - 1}."
            )
        if not 1 <= self.master_port <= 65535:
            raise EzpzError(
                f"--master-port {self.master_port}: ports are 1 to 65535. Take one that is free on "
                "node 0, 29500 for instance."
            )

    @property
    def torchrun_arguments(self) -> list[str]:
        fields = asdict(self).items()
        return [part for name, value in fields for part in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Node:
    """One machine of a run.

    Attributes:
        rank: its ``--node-rank``.
        host: its name for people.
        address: where the others reach it.
        port: open as long as its launcher lives.
        nproc: its worker processes.
    """

    rank: int
    host: str
    address: str
    port: int
    nproc: int

    def state(self) -> State:
        """Whether its launcher lives; "silent" is a machine that is down or cut off."""
        try:
            socket.create_connection((self.address, self.port), SECONDS_TO_ANSWER).close()
        except ConnectionRefusedError:
            return "ended"
        except OSError:
            return "silent"
        return "answers"


@contextlib.contextmanager
def meet(
    placement: Placement, nproc: int, *, seconds: float = SECONDS_TO_MEET
) -> Iterator[list[Node]]:
    """All nodes of the run, in order of rank, once each of them has come here.

    Within the context this node answers the others. gloo is told to use the network that leads
    to node 0, unless ``GLOO_SOCKET_IFNAME`` is set: by itself it would take the one that the host
    name resolves to, which often is the loopback.

    Args:
        nproc: worker processes on this node.
        seconds: how long to wait for the others.

    Raises:
        EzpzError: a node did not come, two have the same rank, or node 0 is not where
            ``--master-addr`` says.
    """
    deadline = time.monotonic() + seconds
    with _open_port(backlog=placement.nnodes) as port:
        if placement.node_rank == 0:
            _check_that_this_is_node_0(placement)
            address = placement.master_addr
        else:
            address = _own_address(placement, deadline)
        _use_network_of(address)
        store = _store(placement, deadline)  # served by node 0 until the context ends
        own = Node(placement.node_rank, socket.gethostname(), address, port, nproc)
        yield _exchange(store, own, placement, deadline)


def loss_report(nodes: Sequence[Node], own_rank: int, last_words: str) -> str | None:
    """Which nodes were lost, for people; None when all others answer.

    Nodes that have ended are named only when none is silent: they may have ended because of the
    silent one, as this node does now.

    Args:
        last_words: what the failed worker of this node said.
    """
    others = [node for node in nodes if node.rank != own_rank]
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        states = dict(zip(others, pool.map(Node.state, others), strict=True))
    for state, meaning in (
        ("silent", "it does not answer, so it is down or cut off"),
        ("ended", "its launcher has ended; what it printed says why"),
    ):
        if lost := [node for node in others if states[node] == state]:
            lines = [f"lost {_described(node, nodes)}: {meaning}." for node in lost]
            if len(lost) == len(others) > 1:
                lines.append("None of the other nodes answers: this one's own network may be down.")
            return "\n".join([*lines, f"This node noticed by: {last_words}"])
    return None


def _described(node: Node, nodes: Sequence[Node]) -> str:
    first = sum(other.nproc for other in nodes if other.rank < node.rank)
    last = first + node.nproc - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    return f"node {node.rank} ({node.host}, {node.address}, {ranks})"


@contextlib.contextmanager
def _open_port(backlog: int) -> Iterator[int]:
    """A port at which knocks are answered by the kernel; nobody has to accept them."""
    with socket.create_server(("", 0), backlog=max(backlog, 128)) as server:
        yield server.getsockname()[1]


def _check_that_this_is_node_0(placement: Placement) -> None:
    where = (placement.master_addr, placement.master_port)
    try:
        socket.create_server(where).close()
    except OSError as reason:
        raise EzpzError(
            f"node 0 cannot serve --master-addr {where[0]} --master-port {where[1]}: "
            f"{reason.strerror or reason}. --node-rank 0 belongs on the machine that --master-addr "
            "names, and the port must be free there."
        ) from None


def _own_address(placement: Placement, deadline: float) -> str:
    """The address of this node on its route to node 0, which the others can reach it by."""
    where = (placement.master_addr, placement.master_port)
    while True:
        try:
            with socket.create_connection(where, SECONDS_TO_ANSWER) as connection:
                return connection.getsockname()[0]
        except OSError as reason:
            if time.monotonic() > deadline or isinstance(reason, socket.gaierror):
                raise EzpzError(
                    f"node 0 cannot be reached at --master-addr {where[0]} --master-port "
                    f"{where[1]}: {reason}. Start the run there with --node-rank 0, and look "
                    "whether a firewall closes the port."
                ) from None
            time.sleep(0.5)


def _use_network_of(address: str) -> None:
    address = socket.gethostbyname(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _store(placement: Placement, deadline: float) -> TCPStore:
    # Not at the top: a mistake in the job costs no import of torch.
    from torch.distributed import TCPStore

    return TCPStore(
        placement.master_addr,
        placement.master_port,
        is_master=placement.node_rank == 0,
        timeout=_left(deadline),
        wait_for_workers=False,
        multi_tenant=True,  # torchrun's static rendezvous then shares the server
    )


def _exchange(store: TCPStore, own: Node, placement: Placement, deadline: float) -> list[Node]:
    from torch.distributed import DistNetworkError

    keys = [_KEY.format(rank) for rank in range(placement.nnodes)]
    try:
        if store.add(f"{keys[own.rank]}/taken", 1) > 1:
            raise EzpzError(f"--node-rank {own.rank} is taken: every node needs its own.")
        store.set(keys[own.rank], json.dumps(asdict(own)))
        while not store.check(keys):  # unlike `store.wait`, Ctrl-C ends it
            if time.monotonic() > deadline:
                missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
                raise EzpzError(
                    f"of {placement.nnodes} nodes these have not come: {', '.join(missing)}. Start "
                    "the same line on each, with its own --node-rank."
                )
            time.sleep(0.2)
        return [Node(**json.loads(store.get(key))) for key in keys]
    except DistNetworkError:
        raise EzpzError(
            "node 0 has gone before all nodes had come; what it printed says why."
        ) from None


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
