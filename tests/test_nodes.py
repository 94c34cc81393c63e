"""The nodes of a run: how they meet, and what is said of one that does not come or is lost.

The nodes are threads here, and processes where they are killed; ``test_two_nodes.py`` has a network
between them.
"""

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from ezpz_moe.cli.train import Train
from ezpz_moe.errors import EzpzError
from ezpz_moe.tools import launch, nodes
from ezpz_moe.tools.nodes import Node, Placement, loss_report, meet


@pytest.fixture(autouse=True)
def _network_of_gloo(monkeypatch):
    """What a meeting sets is unset again."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def come(*placements: Placement, nproc: int = 1, seconds: float = 30) -> list:
    """What each node gets: the nodes that it has met, or its error."""
    met = threading.Barrier(len(placements))
    with ThreadPoolExecutor(len(placements)) as pool:
        return list(pool.map(lambda each: come_one(each, met, nproc, seconds), placements))


def come_one(placement: Placement, met: threading.Barrier, nproc: int = 1, seconds: float = 30):
    try:
        with meet(placement, nproc + placement.node_rank, seconds=seconds) as all_nodes:
            met.wait()  # node 0 serves the others
            return all_nodes
    except EzpzError as error:
        met.abort()
        return str(error)
    except threading.BrokenBarrierError:
        return "another node failed"


def test_all_nodes_know_all_nodes(port):
    results = come(*(Placement(3, rank, "127.0.0.1", port) for rank in range(3)))
    assert results[0] == results[1] == results[2]
    assert [(node.rank, node.nproc) for node in results[0]] == [(0, 1), (1, 2), (2, 3)]
    assert {node.host for node in results[0]} == {socket.gethostname()}
    assert len({node.port for node in results[0]}) == 3
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")


@needs_ipv6
def test_nodes_meet_over_ipv6_and_find_each_other_later(port):
    first, second = (Placement(2, rank, "::1", port) for rank in range(2))
    met = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(come_one, second, met)
        with meet(first, 1, seconds=20) as all_nodes:
            states = [node.state() for node in all_nodes]
            met.wait()
        assert other.result() == all_nodes
    assert [node.address for node in all_nodes] == ["::1", "::1"]
    assert states == ["answers", "answers"]
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


@pytest.fixture
def localhost_has_both(port, monkeypatch) -> None:
    """``localhost`` means ::1 and 127.0.0.1, in this order."""
    both = [
        (family, socket.SOCK_STREAM, 0, "", (address, port))
        for family, address in ((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"))
    ]
    look_up = socket.getaddrinfo
    names = {"localhost": both}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *a, **k: names.get(name) or look_up(name, *a, **k)
    )


@needs_ipv6
@pytest.mark.usefixtures("localhost_has_both")
def test_a_name_of_both_families_means_ipv4_on_every_node(port):
    all_nodes, _ = come(*(Placement(2, rank, "localhost", port) for rank in range(2)))
    assert [node.address for node in all_nodes] == ["127.0.0.1", "127.0.0.1"]


@needs_ipv6
@pytest.mark.usefixtures("localhost_has_both")
def test_also_where_the_store_opens_after_ipv4_was_tried(port, monkeypatch):
    """Node 0 begins only when the other has been refused at IPv4, and the other waits for it."""
    first, second = (Placement(2, rank, "localhost", port) for rank in range(2))
    met = threading.Barrier(2)
    connect = socket.create_connection

    def connect_late(address, *rest):
        if address == ("::1", port):
            node_0 = pool.submit(come_one, first, met)
            while not _listens(port) and not node_0.done():
                time.sleep(0.01)
        return connect(address, *rest)

    monkeypatch.setattr(socket, "create_connection", connect_late)
    with ThreadPoolExecutor(1) as pool:
        all_nodes = come_one(second, met)
    assert [node.address for node in all_nodes] == ["127.0.0.1", "127.0.0.1"]


def _listens(port: int) -> bool:
    with socket.socket() as knocking:
        return knocking.connect_ex(("127.0.0.1", port)) == 0


@needs_ipv6
def test_each_node_knows_node_0_by_the_address_that_leads_there(port):
    """Node 0's own may not: its name often means 127.0.1.1 on the machine itself."""
    results = come(Placement(2, 0, "127.0.0.1", port), Placement(2, 1, "::1", port))
    assert [all_nodes[0].address for all_nodes in results] == ["127.0.0.1", "::1"]


def test_the_users_network_for_gloo_stands(port, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    come(Placement(1, 0, "127.0.0.1", port))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_nodes_that_do_not_come_are_named(port):
    (error,) = come(Placement(4, 0, "127.0.0.1", port), seconds=1)
    assert "of 4 nodes these have not arrived: 1, 2, 3." in error


def test_a_node_0_that_gives_up_ends_the_others(port):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(come, Placement(3, 1, "127.0.0.1", port), seconds=600)
        come(Placement(3, 0, "127.0.0.1", port), seconds=5)
        (error,) = waiting.result(timeout=60)
    assert error == "node 0 has left before all nodes arrived; its own output says why."


def test_a_rank_that_is_taken_is_refused(port):
    same = Placement(2, 0, "127.0.0.1", port), *[Placement(3, 1, "127.0.0.1", port)] * 2
    results = come(*same, seconds=3)
    taken = f"--node-rank 1 is taken by {socket.gethostname()} (127.0.0.1), which answers"
    assert any(taken in str(result) for result in results)


WAITING_NODE = """
import sys
from ezpz_moe.tools.nodes import Placement, meet
nnodes, rank, address, port = sys.argv[1:]
with meet(Placement(int(nnodes), int(rank), address, int(port)), 1):
    print("met", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def process_of(placement: Placement) -> Iterator[subprocess.Popen]:
    """A node in a process of its own, which is killed at the end."""
    where = map(str, dataclasses.astuple(placement))
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_NODE, *where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def ended_before_all_had_come(placement: Placement) -> Node:
    """A node that came and was killed while it waited."""
    patience = timedelta(seconds=60)
    with process_of(placement) as process:
        # The store waits for node 0, which another thread starts.
        store = TCPStore(placement.master_addr, placement.master_port, timeout=patience)
        key = nodes._KEY.format(placement.node_rank)
        while not store.check([key]):
            assert process.poll() is None
            time.sleep(0.1)
        return Node(**json.loads(store.get(key)))


def test_a_node_that_ended_while_it_waited_can_be_started_again(port):
    first, *later = (Placement(3, rank, "127.0.0.1", port) for rank in range(3))
    met = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(come_one, first, met, seconds=90)]
        ended = ended_before_all_had_come(later[0])
        results += [pool.submit(come_one, each, met) for each in later]
        all_nodes, *others = (result.result() for result in results)
    assert [node.rank for node in all_nodes] == [0, 1, 2]
    assert others == [all_nodes] * 2
    assert ended.rank == 1
    assert ended not in all_nodes


def test_the_run_does_not_begin_with_a_node_that_has_ended(port):
    first, third = (Placement(3, rank, "127.0.0.1", port) for rank in (0, 2))
    met = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(come_one, first, met, seconds=5)
        with socket.create_server(("127.0.0.1", 0)) as server:
            ended = Node(1, socket.gethostname(), "127.0.0.1", server.getsockname()[1], 1)
        store = TCPStore("127.0.0.1", port, timeout=timedelta(seconds=60))
        store.set(nodes._KEY.format(1), json.dumps(dataclasses.asdict(ended)))
        other = come_one(third, met)
        error = waiting.result()
    assert error == (
        f"these nodes have arrived but do not answer node 0: node 1 ({socket.gethostname()}, "
        "127.0.0.1, rank 1). They have ended since, or a firewall is in between. Run the same "
        "command again on every node."
    )
    assert other == "node 0 has left before all nodes arrived; its own output says why."


def test_a_node_that_is_started_again_after_the_beginning_is_refused(port):
    first, second = (Placement(2, rank, "127.0.0.1", port) for rank in range(2))
    met = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(come_one, first, met, seconds=90)
        with process_of(second) as process:
            assert process.stdout.readline() == "met\n"
        error = come_one(second, met)
        assert running.result() == "another node failed"
    assert "--node-rank 1: the run has begun with another start of this node" in error


def test_different_numbers_of_nodes_are_refused(port):
    numbers = (3, 2, 3)
    results = come(*(Placement(n, rank, "127.0.0.1", port) for rank, n in enumerate(numbers)))
    assert "--nnodes is 2 here but 3 on node 0. Run the same command on each node." in results


def test_a_node_0_that_is_not_there_is_an_error(port):
    (error,) = come(Placement(2, 1, "127.0.0.1", port), seconds=0)
    assert f"cannot be reached at --master-addr 127.0.0.1 --master-port {port}" in error
    assert "Connection refused" in error


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_name_of_node_0_is_not_waited_for(port, rank):
    (error,) = come(Placement(2, rank, "no-such-host.invalid", port), seconds=600)
    assert "cannot be reached at --master-addr no-such-host.invalid" in error
    assert error.endswith("Use a name that this machine can resolve, or an address.")


def test_what_cannot_be_a_name_is_an_error(port):
    (error,) = come(Placement(2, 1, "a" * 80, port))
    assert f"cannot be reached at --master-addr {'a' * 80}: " in error


def test_a_port_that_is_in_use_at_another_address_of_node_0_is_an_error(port):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = come(Placement(2, 0, "127.0.0.2", port))
    assert "node 0 cannot serve --master-addr 127.0.0.2" in error
    assert "Address already in use" in error


@pytest.mark.parametrize(
    ("address", "reason"),
    [("127.0.0.1", "Address already in use"), ("192.0.2.1", "Cannot assign requested address")],
)
def test_node_0_has_to_be_where_the_others_look_for_it(port, address, reason):
    with socket.create_server(("127.0.0.1", port)):
        (error,) = come(Placement(2, 0, address, port))
    assert f"node 0 cannot serve --master-addr {address} --master-port {port}: {reason}" in error


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_beyond_the_nodes_is_refused(rank):
    with pytest.raises(EzpzError, match=f"--node-rank {rank}: with --nnodes 2 it must be 0 to 1"):
        Placement(2, rank, "node0", 29500)


@pytest.mark.parametrize("nnodes", [0, -1])
def test_fewer_than_one_machine_are_refused(nnodes):
    with pytest.raises(EzpzError, match=f"--nnodes {nnodes}: must be at least 1 machine"):
        Placement(nnodes, 0, "node0", 29500)
    with pytest.raises(EzpzError, match=f"--nnodes {nnodes}: must be at least 1 machine"):
        Train(config=("debugmodel",), nnodes=nnodes).run()


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_that_cannot_be_is_refused(port):
    with pytest.raises(EzpzError, match=f"--master-port {port}: must be 1 to 65535"):
        Placement(2, 0, "node0", port)


@pytest.mark.parametrize("missing", ["node_rank", "master_addr"])
def test_the_place_has_to_be_given_for_several_nodes(missing):
    told = {"node_rank": 0, "master_addr": "node0", missing: None}
    with pytest.raises(EzpzError, match=r"--nnodes 2 needs --node-rank.* and --master-addr"):
        Train(config=("debugmodel",), nnodes=2, **told).run()


# --- after a failure --------------------------------------------------------------------------


@contextlib.contextmanager
def three_nodes(monkeypatch, *states: str):
    """Nodes of two ranks each, the second and third of which are found to be so."""
    found = dict(enumerate(states, start=1))
    monkeypatch.setattr(Node, "state", lambda node: found[node.rank])
    yield [Node(rank, f"host{rank}", f"10.0.0.{rank}", 1, 2) for rank in range(3)]


SILENT = "it does not answer, so it is down or cut off."
ENDED = "its launcher has ended; its own output says why."


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("answers", "answers"), None),
        (("answers", "silent"), [f"lost node 2 (host2, 10.0.0.2, ranks 4 to 5): {SILENT}"]),
        (("ended", "silent"), [f"lost node 2 (host2, 10.0.0.2, ranks 4 to 5): {SILENT}"]),
        (("ended", "answers"), [f"lost node 1 (host1, 10.0.0.1, ranks 2 to 3): {ENDED}"]),
        (
            ("silent", "silent"),
            [
                f"lost node 1 (host1, 10.0.0.1, ranks 2 to 3): {SILENT}",
                f"lost node 2 (host2, 10.0.0.2, ranks 4 to 5): {SILENT}",
                "No other node answers: this node's own network may be down.",
            ],
        ),
    ],
)
def test_the_report_names_who_is_silent_else_who_has_ended(monkeypatch, states, expected):
    with three_nodes(monkeypatch, *states) as all_nodes:
        report = loss_report(all_nodes, 0, "a timeout")
    if expected is None:
        assert report is None
    else:
        assert report.splitlines() == [*expected, "This node noticed by: a timeout"]


def test_a_node_answers_while_its_run_lasts_and_has_ended_afterwards(port):
    with meet(Placement(1, 0, "127.0.0.1", port), 1) as (node,):
        # More often than anybody accepts: each survivor of a big run asks.
        assert [node.state() for _ in range(100)] == ["answers"] * 100
    assert node.state() == "ended"


def test_a_machine_that_does_not_answer_is_silent(port, monkeypatch):
    monkeypatch.setattr(nodes, "SECONDS_TO_ANSWER", 0.1)
    with socket.create_server(("127.0.0.1", port), backlog=0) as full:
        waiting = [socket.socket() for _ in range(3)]
        for client in waiting:  # a full queue drops what comes, as a dead machine does
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        assert Node(1, "host1", "127.0.0.1", port, 1).state() == "silent"
        for client in waiting:
            client.close()


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"message": "RuntimeError: line 1\nTimed out", "extraInfo": {}}, "Timed out"),
        ("Signal 6 (SIGABRT) received by PID 7\n", "Signal 6 (SIGABRT) received by PID 7"),
    ],
)
def test_the_last_words_are_the_last_line_of_a_failure(message, expected):
    failure = ProcessFailure(local_rank=0, pid=7, exitcode=1, error_file="none")
    failure.message = message
    assert launch.last_words(failure) == expected
