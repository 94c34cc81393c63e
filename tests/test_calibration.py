"""What a measured machine's file says, and how a plan reads it."""

import math
import os
import signal
import statistics
from dataclasses import replace

import fork_server
import pytest
import tomli
import torch
import torch.distributed as dist
from dialect import ON_0_2, SINCE_2026_08
from trainer_runs import job_folder

if ON_0_2 or SINCE_2026_08:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.tools.calibration import calibrate, written
from ezpz_moe.tools.calibration import links as measured_links
from ezpz_moe.tools.calibration.rank import Found
from ezpz_moe.tools.nodes import Placement
from ezpz_moe.tools.planning import cuts, links, machine, plans, steps
from ezpz_moe.tools.planning.machine import Curve, Measured

CUT = cuts.Cut(2, 1, 1, 1, 1, 2, 1, "none")
GATHER = Measured(
    tier="node",
    kind="all-gather",
    ranks=2,
    seconds=Curve(sizes=(1e3, 1e5), values=(1e-3, 1e-1)),
)
FOUND = Found(
    device="a CPU",
    kind="cpu",
    ranks=4,
    per_node=2,
    memory=1e9,
    products={1e6: 1e10, 1e8: 4e10},
    attention=1e10,
    experts={"for_loop": {8.0: 1e10, 32.0: 2e10}, "batched_mm_padded": {8.0: 3e10}},
    bandwidth=1e10,
    alone=1.5,
    overlap=0.25,
    collectives=[GATHER, GATHER.model_copy(update={"tier": "network", "ranks": 4})],
)


def test_a_curve_is_straight_between_logarithms():
    curve = Curve(sizes=(1, 100), values=(2, 8))
    assert [curve.at(size) for size in (0.5, 1, 10, 100, 1e6)] == pytest.approx([2, 2, 4, 8, 8])
    assert [curve.beyond(size) for size in (0.5, 10, 100, 1e3)] == pytest.approx([2, 4, 8, 80])


@pytest.mark.parametrize(
    ("sizes", "values", "why"),
    [((2, 1), (1, 1), "sizes must rise"), ((1, 2), (1,), "2 sizes have 1 values")],
)
def test_a_curve_that_is_none_is_refused(sizes, values, why):
    with pytest.raises(ValueError, match=why):
        Curve(sizes=sizes, values=values)


def test_what_was_measured_counts_before_bandwidth_and_latency(tmp_path):
    on = written_machine(tmp_path)
    took = [links.seconds(on, 4, "all-gather", size, 1, 1e4) for size in (2, 4)]
    # Of four ranks each passes on three quarters of the whole, of two one half.
    assert took == pytest.approx([1e-2, GATHER.seconds.at(1.5e4)])
    assert links.seconds(on, 2, "all-gather", 4, 1, 1e4) == pytest.approx(1e-2)  # over the network
    unmeasured = links.seconds(on, 4, "all-reduce", 2, 1, 1e4)
    assert unmeasured == pytest.approx(2 * (on.node.latency + 0.5e4 / on.node.rate))


def written_machine(folder):
    path = folder / "measured.toml"
    path.write_text(written.as_toml(FOUND, "job.toml", 4))
    return machine.machine(str(path))


def test_the_file_says_what_was_measured(tmp_path):
    on = written_machine(tmp_path)
    compute = on.compute
    assert (compute.float32, compute.products, compute.attention) == (4e10, 1, 0.25)
    assert compute.by_flops == Curve(sizes=(1e6, 1e8), values=(0.25, 1))
    assert compute.backends == {
        "for_loop": Curve(sizes=(8, 32), values=(0.25, 0.5)),
        "batched_mm_padded": Curve(sizes=(8,), values=(0.75,)),
    }
    assert (compute.experts, compute.alone, on.overlap) == (0.75, 1.5, 0.25)
    assert (on.ranks_per_node, on.memory.size, on.memory.bandwidth) == (2, 1e9, 1e10)
    assert on.collectives == tuple(FOUND.collectives)
    # Half of 100 KB in a tenth of a second.
    assert (on.node.rate, on.node.latency) == (5e5, 1e-3)
    said = tomli.loads((tmp_path / "measured.toml").read_text())["sources"]["all"]
    assert said.startswith("`ezpz-moe plan job.toml --calibrate`")
    assert said.endswith("float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return job_folder(tmp_path_factory.mktemp("calibrated"))


@pytest.fixture(scope="module")
def sheet(folder):
    return host().planning().model_sheet(str(folder / "job.toml"), [], is_cpu=True)


def terms(sheet, on, cut=CUT, imbalance=1.0):
    return steps.step_time(sheet, cut, on, 2, imbalance).terms


def test_experts_have_the_rate_of_their_backend_at_their_rows(sheet, tmp_path):
    on = written_machine(tmp_path)
    on = on.model_copy(update={"memory": on.memory.model_copy(update={"bandwidth": 1e15})})
    routed = sheet.routed[0]
    # So few that twice as many are still among those that were measured.
    seq_len = 5 * routed.num_experts // routed.top_k
    sheet = replace(sheet, job=replace(sheet.job, seq_len=seq_len))
    rows = 2 * seq_len * routed.top_k / routed.num_experts
    assert 8 < rows < 2 * rows < 32
    by_rows = {
        kept: terms(replace(sheet, backend=name), on, cut)["routed experts"]
        for kept, name, cut in (
            ("as measured", "for_loop", CUT),
            ("of both ranks", "for_loop", replace(CUT, ep=2)),
            ("not measured", "grouped_mm", CUT),
        )
    }
    share = on.compute.backends["for_loop"].at
    expected = by_rows["not measured"] * 0.75
    assert by_rows["as measured"] == pytest.approx(expected / share(rows))
    assert by_rows["of both ranks"] == pytest.approx(expected / share(2 * rows))


def test_small_products_are_slower(sheet, tmp_path):
    on = written_machine(tmp_path)
    level = on.model_copy(update={"compute": on.compute.model_copy(update={"by_flops": None})})
    # All of them are below a megaflop with two tokens.
    small = replace(sheet, job=replace(sheet.job, seq_len=1))
    name = "dense products"
    assert terms(small, on)[name] == pytest.approx(4 * terms(small, level)[name])


def test_gradients_are_copied_and_divided_wherever_they_are_added_up(sheet, tmp_path):
    on = written_machine(tmp_path)
    replicas = replace(CUT, dp_shard=1, dp_replicate=2)
    learned = sum(w.learns * math.prod(w.shape) for p in sheet.parts.values() for w in p.weights)
    read_and_written = 4 * learned * sheet.job.reduce_bytes
    copies = terms(sheet, on, replicas)["copies of FSDP"]
    assert copies == pytest.approx(read_and_written / on.memory.bandwidth)
    # Besides the same of gradients: weights are gathered for forward, and most for backward.
    sharded = terms(sheet, on, CUT)["copies of FSDP"]
    assert 1.5 < sharded / copies < 2.1


def test_ranks_that_wait_leave_their_cores_to_others(sheet, tmp_path):
    shared = written_machine(tmp_path)
    own = shared.model_copy(update={"compute": shared.compute.model_copy(update={"alone": 1})})
    piped = replace(CUT, dp_shard=1, pp=2)
    bubbles = [terms(sheet, on, piped)["pipeline bubble"] for on in (own, shared)]
    # With one microbatch it is as much again as the stage's own work.
    assert bubbles[1] == pytest.approx(2 * bubbles[0] / 1.5 - bubbles[0])
    uneven = [terms(sheet, on, imbalance=3)["imbalance of the experts"] for on in (own, shared)]
    assert uneven[1] == pytest.approx(uneven[0] / 2)  # twice the mean in place of three times


def test_a_backend_that_pads_waits_for_the_busiest_expert(folder, tmp_path):
    config, on = str(folder / "job.toml"), written_machine(tmp_path)
    arguments = {"world_size": 2, "ranks_per_node": None, "on": on}
    even, uneven = (
        plans.plan(config, [], load=load, **arguments) for load in ("balanced", "zipf1")
    )
    for backend, waits in (
        ("for_loop", 1),
        ("batched_mm_padded", 8 / sum(1 / n for n in range(1, 9))),
    ):
        choice = f"backend={backend} ep=1 dp_shard=2 ac=none microbatch=1"
        times = [plans.best_with(found, choice).time.terms for found in (even, uneven)]
        more = times[1].get("imbalance of the experts", 0) / times[0]["routed experts"]
        assert 1 + more == pytest.approx(max(1, waits / on.compute.alone))


def test_overlap_hides_its_share(sheet, tmp_path):
    on = written_machine(tmp_path)
    time = steps.step_time(sheet, CUT, on, 2, 1.0)
    hidden = sum(s for name, s in time.terms.items() if name.startswith("FSDP:"))
    computed = time.worst - hidden - time.terms["optimizer"]
    assert time.predicted == pytest.approx(time.worst - 0.25 * min(hidden, computed))


def test_backends_that_were_measured_are_a_choice(folder, tmp_path):
    config, on = str(folder / "job.toml"), written_machine(tmp_path)
    found = plans.plan(config, [], world_size=2, ranks_per_node=None, on=on, load="balanced")
    assert {row.cut.backend for row in found.rows} == {"for_loop", "batched_mm_padded"}
    # Three times as fast at eight rows, and more than twice at any number.
    assert found.rows[0].cut.backend == "batched_mm_padded"
    other = plans.best_with(found, "backend=for_loop")
    assert (other.cut.backend, found.own.cut.backend) == ("for_loop", "")
    assert other.time.predicted > found.rows[0].time.predicted, "or any name could be the first"
    with pytest.raises(EzpzError, match="'4 ranks of a CPU' has no figure of this backend: for_l"):
        plans.best_with(found, "backend=grouped_mm_fused")
    assert {each["backend"] for each in map(plans.as_json, found.rows)} == set(on.compute.backends)


def test_groups_are_of_neighbours_and_of_one_rank_of_each_node():
    assert list(measured_links.groups(8, 8)) == [(2, 1), (4, 1), (8, 1)]
    assert list(measured_links.groups(8, 4)) == [(2, 1), (4, 1), (8, 1), (2, 4)]
    assert list(measured_links.groups(6, 2)) == [(2, 1), (6, 1), (3, 2)]


@pytest.mark.train
@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", measured_links._KINDS)
def test_a_collective_has_the_bytes_that_it_is_filed_under(kind, size, monkeypatch):
    """Of the whole tensor, which a rank has, or has its share of."""
    seen = []
    # Of what is called, only the tensors matter; no group of processes is needed to see them.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
        monkeypatch.setattr(dist, name, lambda *tensors, group: seen.extend(tensors))
    monkeypatch.setattr(dist, "all_to_all_single", lambda *tensors, group: seen.extend(tensors))
    monkeypatch.setattr(dist, "send", lambda tensor, rank, group: seen.append(tensor))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    measured_links._KINDS[kind](None, size, 4096, torch.device("cpu"))()
    shares = {"all-gather": [4096, 4096 // size], "reduce-scatter": [4096 // size, 4096]}
    whole = [4096] * (2 if kind == "all-to-all" else 1)
    assert [tensor.nbytes for tensor in seen] == shares.get(kind, whole)


def test_two_real_ranks_write_a_file_that_plans(folder, sheet, port, tmp_path, monkeypatch):
    """Started as on several machines, which meet first, although it is only one."""
    monkeypatch.setenv("PYTHON_EXEC", fork_server.python())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    path, config = tmp_path / "machine.toml", str(folder / "job.toml")
    here = Placement(1, 0, "127.0.0.1", port)
    found = calibrate.calibrate(config, [], path, nproc=2, placement=here)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    on = machine.machine(str(path))
    assert {(each.tier, each.kind, each.ranks) for each in on.collectives} == {
        ("node", kind, 2)
        for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send")
    }
    # Larger takes longer by far: 16 thousand times as many bytes. The median, because a busy
    # machine may have held up one of them.
    ratios = [each.seconds.values[-1] / each.seconds.values[0] for each in on.collectives]
    assert statistics.median(ratios) > 3
    assert max(on.compute.by_flops.values) == 1
    # The products that the job has are among those that were measured.
    dense = (w for part in sheet.parts.values() for w in part.weights if not w.is_expert)
    tokens = sheet.job.local_batch * sheet.job.seq_len
    assert on.compute.by_flops.sizes[-1] >= tokens * max(weight.forward for weight in dense)
    assert {"for_loop", "batched_mm_padded", "grouped_mm"} <= set(on.compute.backends)
    assert "auto" not in on.compute.backends
    assert found.ranks == found.per_node == on.ranks_per_node == 2
    planned = plans.plan(config, [], world_size=2, ranks_per_node=None, on=on, load="balanced")
    assert planned.rows


def test_a_rank_that_fails_says_why(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON_EXEC", fork_server.python())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nonsense")
    path = tmp_path / "machine.toml"
    with pytest.raises(EzpzError, match=r"a rank has failed: RuntimeError: .*nonsense"):
        calibrate.calibrate(str(folder / "job.toml"), [], path, nproc=2, placement=None)
    assert not path.exists()
