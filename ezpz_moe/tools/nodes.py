"""The machines of one run: they meet before torchrun starts, and know later which one was lost.

torchrun, gloo and NCCL notice that a machine is silent, but they do not say which one: "Timed out
waiting 10000ms for send operation". So every node keeps a port open while it runs and tells the
others where. Node 0 knocks at all ports before the run begins, and the survivors do after a
failure. Nothing is sent in between.

They meet at torchrun's own meeting point: the TCPStore that node 0 serves at ``--master-addr``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import psutil

from ezpz_moe.errors import EzpzError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

SECONDS_TO_MEET = 600  # torchrun's own patience with nodes that start late
SECONDS_TO_ANSWER = 5  # Linux tries three times within it: at 0, 1 and 3 seconds
_KEY = "ezpz_moe/node/{}"
_ALL = "ezpz_moe/tools/nodes"  # node 0 writes this once all have arrived, and the run begins

State = Literal["answers", "ended", "silent"]


@dataclass(frozen=True)
class Placement:
    """This machine's place in a run, in torchrun's words.

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
            raise EzpzError(f"--nnodes {self.nnodes}: must be at least 1 machine.")
        if not 0 <= self.node_rank < self.nnodes:
            raise EzpzError(
                f"--node-rank {self.node_rank}: with --nnodes {self.nnodes} it must be 0 to "
                f"{self.nnodes - 1}."
            )
        if not 1 <= self.master_port <= 65535:
            raise EzpzError(
                f"--master-port {self.master_port}: must be 1 to 65535. Choose a port that is free "
                "on node 0, such as 29500."
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
        host: its name, for messages.
        address: where the others reach it.
        port: open as long as its launcher lives.
        nproc: its number of worker processes.
    """

    rank: int
    host: str
    address: str
    port: int
    nproc: int

    def state(self) -> State:
        """Return whether its launcher lives; "silent" means that the machine is down or cut off."""
        try:
            socket.create_connection((self.address, self.port), SECONDS_TO_ANSWER).close()
        # A refusal comes from the machine's kernel: the machine is up, but nobody listens any more.
        except ConnectionRefusedError:
            return "ended"
        except OSError:
            return "silent"
        return "answers"


@contextlib.contextmanager
def meet(
    placement: Placement, nproc: int, *, seconds: float = SECONDS_TO_MEET
) -> Iterator[list[Node]]:
    """Wait for the other nodes; yield all, in order of rank, once each of them has arrived here.

    Within the context this node answers the others. It also tells gloo to use the network that
    leads to node 0, unless ``GLOO_SOCKET_IFNAME`` is set: by default gloo takes the network that
    the host name resolves to, often the loopback.

    Args:
        nproc: worker processes on this node.
        seconds: how long to wait for the others.

    Raises:
        EzpzError: a node did not arrive, or arrived and does not answer, two have the same rank, or
            node 0 is not where ``--master-addr`` says.
    """
    # monotonic, because the clocks of a cluster may be set while nodes wait.
    deadline = time.monotonic() + seconds
    # Open before the store has this node's entry: node 0 knocks as soon as all have one.
    with _open_port(backlog=placement.nnodes) as port:
        if placement.node_rank == 0:
            address = address_of_node_0 = _served_address(placement)
        else:
            address, address_of_node_0 = _route_to_node_0(placement, deadline)
        # Before torchrun starts the workers: they inherit the variable, and gloo reads it there.
        _use_network_of(address)
        store = _store(placement, deadline)  # served by node 0 until the context ends
        own = Node(placement.node_rank, socket.gethostname(), address, port, nproc)
        node_0, *others = _exchange(store, own, placement, deadline)
        # Node 0 may know itself by an address that leads nowhere from here, such as 127.0.1.1.
        yield [replace(node_0, address=address_of_node_0), *others]


def loss_report(nodes: Sequence[Node], own_rank: int, last_words: str) -> str | None:
    """Return which nodes were lost, in words; None if all others answer.

    Names nodes that have ended only if none is silent: they may have ended because of the silent
    one, as this node does now.

    Args:
        last_words: what the failed worker of this node said.
    """
    others = [node for node in nodes if node.rank != own_rank]
    # Ask after the failure, not during the run: nothing is sent while all is well.
    states = _states(others)
    for state, meaning in (
        ("silent", "it does not answer, so it is down or cut off"),
        ("ended", "its launcher has ended; its own output says why"),
    ):
        if lost := [node for node in others if states[node] == state]:
            lines = [f"lost {_described(node, nodes)}: {meaning}." for node in lost]
            if len(lost) == len(others) > 1:
                lines.append("No other node answers: this node's own network may be down.")
            return "\n".join([*lines, f"This node noticed by: {last_words}"])
    return None


def _states(nodes: Sequence[Node]) -> dict[Node, State]:
    """Ask all nodes at once."""
    with ThreadPoolExecutor(max_workers=max(1, len(nodes))) as pool:
        return dict(zip(nodes, pool.map(Node.state, nodes), strict=True))


def _described(node: Node, nodes: Sequence[Node]) -> str:
    first = sum(other.nproc for other in nodes if other.rank < node.rank)
    last = first + node.nproc - 1
    ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
    return f"node {node.rank} ({node.host}, {node.address}, {ranks})"


@contextlib.contextmanager
def _open_port(backlog: int) -> Iterator[int]:
    """Open a port where the kernel answers knocks; nobody has to accept them."""
    with _at_all_addresses(port=0) as server:
        # Knocks stay in the queue, because nobody accepts them: leave room for all nodes.
        server.listen(max(backlog, 128))
        yield server.getsockname()[1]


@contextlib.contextmanager
def _at_all_addresses(port: int) -> Iterator[socket.socket]:
    """Bind a socket like the store's: to IPv4 and, if the machine has it, to IPv6."""
    both = socket.has_dualstack_ipv6()
    # One IPv6 socket without V6ONLY also accepts IPv4, as the store's does.
    with socket.socket(socket.AF_INET6 if both else socket.AF_INET) as bound:
        # A node that is started again must not wait until the system forgets old connections.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if both:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(("", port))
        yield bound


def _addresses_of_node_0(placement: Placement) -> list[tuple[socket.AddressFamily, str]]:
    """Resolve ``--master-addr``, IPv4 first: all nodes then choose the same family."""
    name, port = placement.master_addr, placement.master_port
    try:
        # With the type, or each address comes once for every type of socket.
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as reason:
        raise EzpzError(
            f"node 0 cannot be reached at --master-addr {name}: {reason}. Use a name that this "
            "machine can resolve, or an address."
        ) from None
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    return [(family, str(address[0])) for family, *_, address in found]


def _served_address(placement: Placement) -> str:
    """Return the first address of ``--master-addr`` that is ours; check that the port is free."""
    reasons = []
    for family, address in _addresses_of_node_0(placement):
        try:
            with socket.socket(family) as own:
                # The kernel refuses addresses of other machines. Port 0 is any free one.
                own.bind((address, 0))
            # Do not listen: a waiting node would take this socket for the store.
            with _at_all_addresses(placement.master_port):
                return address
        except OSError as reason:
            reasons.append(reason.strerror or str(reason))
    raise EzpzError(
        f"node 0 cannot serve --master-addr {placement.master_addr} --master-port "
        f"{placement.master_port}: {'; '.join(reasons)}. Use --node-rank 0 on the machine that "
        "--master-addr names, and a port that is free there."
    )


def _route_to_node_0(placement: Placement, deadline: float) -> tuple[str, str]:
    """Return this node's address on its route to node 0, for the others, and node 0's."""
    port = placement.master_port
    # Try the addresses in one order everywhere: the nodes then meet in one network.
    addresses = [address for _, address in _addresses_of_node_0(placement)]
    while True:
        way, refusals = _first_answer(addresses, port)
        if refusals and way:
            # The store may have opened between two tries. It opens all addresses at once, so now
            # the first address that leads there answers, on this node as on the others.
            way, refusals = _first_answer(addresses, port)
        if way:
            return way
        if time.monotonic() > deadline:
            raise EzpzError(
                f"node 0 cannot be reached at --master-addr {placement.master_addr} --master-port "
                f"{port}: {'; '.join(refusals)}. Start the run there with --node-rank 0, and check "
                "that no firewall blocks the port."
            )
        time.sleep(0.5)


def _first_answer(addresses: Sequence[str], port: int) -> tuple[tuple[str, str] | None, list[str]]:
    """Return both ends of the first connection made, and why earlier ones failed."""
    refusals: list[str] = []
    for address in addresses:
        try:
            with socket.create_connection((address, port), SECONDS_TO_ANSWER) as connection:
                # Our end has the address that the kernel chose by its routes.
                return (connection.getsockname()[0], address), refusals
        except OSError as reason:
            refusals.append(reason.strerror or str(reason))
    return None, refusals


def _use_network_of(address: str) -> None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            # The user's own choice wins.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _store(placement: Placement, deadline: float) -> TCPStore:
    # Not imported at the top: a mistake in the job should not wait for torch.
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
        _take_place(store, keys[own.rank], own)
        while not _may_begin(store, keys, own):  # unlike `store.wait`, Ctrl-C interrupts it
            if time.monotonic() > deadline:
                raise EzpzError(_who_is_absent(store, keys, own))
            time.sleep(0.2)
        nodes = [Node(**fields) for fields in json.loads(store.get(_ALL))]
    except DistNetworkError:
        raise EzpzError(
            "node 0 has left before all nodes arrived; its own output says why."
        ) from None
    _check_that_it_is_one_of(nodes, own, placement)
    return nodes


def _take_place(store: TCPStore, key: str, own: Node) -> None:
    """Register this node. It may take the place of an earlier start that has ended."""
    # compare_set takes an empty value for that of a key that is not there yet.
    entry, known = json.dumps(asdict(own)), ""
    # compare_set writes only if the key still has the value that we know. A restarted node finds
    # the entry of its earlier start, and replaces it once that no longer answers.
    while (there := store.compare_set(key, known, entry).decode()) != entry:
        holder = Node(**json.loads(there))
        if holder.state() == "answers":
            raise EzpzError(
                f"--node-rank {own.rank} is taken by {holder.host} ({holder.address}), which "
                "answers: every node needs its own. If that is an earlier start of this node, "
                "stop it first."
            )
        known = there


def _may_begin(store: TCPStore, keys: Sequence[str], own: Node) -> bool:
    """Return whether all nodes are there and answer node 0: one may have ended while it waited."""
    # Node 0 alone decides, and publishes the list: each node by itself could begin with another
    # one.
    if own.rank == 0 and store.check(list(keys)):
        nodes = _come(store, keys)
        if all(state == "answers" for state in _states(nodes[1:]).values()):
            store.set(_ALL, json.dumps([asdict(node) for node in nodes]))
    return store.check([*keys, _ALL])


def _come(store: TCPStore, keys: Sequence[str]) -> list[Node]:
    return [Node(**json.loads(store.get(key))) for key in keys]


def _who_is_absent(store: TCPStore, keys: Sequence[str], own: Node) -> str:
    if missing := [str(rank) for rank, key in enumerate(keys) if not store.check([key])]:
        return (
            f"of {len(keys)} nodes these have not arrived: {', '.join(missing)}. Run the same "
            "command on each, with its own --node-rank."
        )
    nodes = _come(store, keys)
    states = _states([node for node in nodes if node.rank != own.rank])
    silent = [_described(node, nodes) for node, state in states.items() if state != "answers"]
    if not silent:
        return "node 0 cannot reach all nodes that have arrived; its own output says which."
    return (
        f"these nodes have arrived but do not answer node {own.rank}: {', '.join(silent)}. They "
        "have ended since, or a firewall is in between. Run the same command again on every node."
    )


def _check_that_it_is_one_of(nodes: Sequence[Node], own: Node, placement: Placement) -> None:
    if len(nodes) != placement.nnodes:
        raise EzpzError(
            f"--nnodes is {placement.nnodes} here but {len(nodes)} on node 0. Run the same command "
            "on each node."
        )
    if own not in nodes:
        other = nodes[own.rank]
        raise EzpzError(
            f"--node-rank {own.rank}: the run has begun with another start of this node, on "
            f"{other.host} ({other.address}). Stop it on every node, then run the same command on "
            "each, with its own --node-rank."
        )


def _left(deadline: float) -> timedelta:
    # At the deadline node 0 may just have answered: leave a second to connect to its store.
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
