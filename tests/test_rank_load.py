"""The load of ranks under expert parallelism, of four ranks in two groups. Over gloo.

Legend: E = experts.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dialect import ON_0_2

if ON_0_2:
    pytest.skip("[telemetry] needs torchtitan 0.3 or later", allow_module_level=True)

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("forked_processes")]

GROUPS, RANKS, E = 2, 2, 4
NOBODY = [0] * 2
COUNTS = [
    [[[9, 0, 1, 1], NOBODY, [1, 2, 0, 0, 0, 0]], [[9, 3, 2, 2], NOBODY, [1, 0, 0, 0, 0, 0]]],
    [[[0, 1, 1, 7], NOBODY, [0, 0, 0, 0, 0, 5]], [[2, 2, 4, 4], NOBODY, [0, 0, 1, 0, 0, 0]]],
]
"""Of the tokens of each rank of both groups, in three layers of 4, 2 and 6 experts."""


def part(rank: int, folder: Path) -> None:
    """Writes what one of the ranks finds."""
    from ezpz_moe.hosts.titan.rank_load import rank_max_over_mean, rows_sent

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=GROUPS * RANKS
    )
    world = torch.distributed.init_device_mesh("cpu", (GROUPS * RANKS,))
    groups = torch.distributed.init_device_mesh(
        "cpu", (GROUPS, RANKS), mesh_dim_names=("efsdp", "ep")
    )
    dims = SimpleNamespace(ep_enabled=True)
    dims.get_optional_mesh = {"ep": groups["ep"], "loss": world}.get
    layers = [torch.tensor(counts_E) for counts_E in COUNTS[rank // RANKS][rank % RANKS]]
    torch.save(rank_max_over_mean(layers, dims), folder / f"{rank}.pt")
    # One group of four ranks, on nodes of two.
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    of_all = torch.distributed.init_device_mesh("cpu", (GROUPS * RANKS,), mesh_dim_names=("ep",))
    dims.get_optional_mesh = {"ep": of_all["ep"], "loss": world}.get
    sent = [torch.tensor([1, 10, 100, 1000]) * (rank + 1), torch.zeros(0, dtype=torch.int64)]
    torch.save(rows_sent([layers[0], layers[0]], sent, dims), folder / f"{rank}.sent.pt")
    torch.distributed.destroy_process_group()


def test_the_busiest_rank_of_all_groups(tmp_path):
    """A group sends to its own ranks alone: over all groups the two halves are even here."""
    torch.multiprocessing.spawn(part, (tmp_path,), nprocs=GROUPS * RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(GROUPS * RANKS)]
    loads = [
        sum(of_rank[0][expert] for of_rank in group for expert in experts)
        for group in COUNTS
        for experts in ([0, 1], [2, 3])
    ]
    assert loads == [21, 6, 5, 16]
    # In the last layer the first group's first rank has 4 of 10, the second's ranks 1 and 5.
    assert found == [[max(loads) / (sum(loads) / 4), None, 5 / (10 / 4)]] * 4

    check_rows([torch.load(tmp_path / f"{rank}.sent.pt") for rank in range(GROUPS * RANKS)])


def check_rows(of_each) -> None:
    """All ranks know the rows of all, by who sends them to whom: here R = 4, E = 4."""
    to_each = [[(rank + 1) * each for each in (1, 10, 100, 1000)] for rank in range(4)]
    composed = [COUNTS[rank // RANKS][rank % RANKS][0] for rank in range(4)]
    expected = []
    for rows_RR in (to_each, composed):
        sums = {"rows_dispatched": 0, "rows_off_rank": 0, "rows_off_node": 0}
        for own, rows_R in enumerate(rows_RR):
            for to, rows in enumerate(rows_R):
                sums["rows_dispatched"] += rows
                sums["rows_off_rank"] += rows * (own != to)
                sums["rows_off_node"] += rows * (own // 2 != to // 2)
        expected.append(sums)
    assert of_each == [expected] * 4


def test_without_expert_parallelism_there_is_none():
    from ezpz_moe.hosts.titan.rank_load import rank_max_over_mean, rows_sent

    alone = SimpleNamespace(get_optional_mesh=lambda name: None)
    assert rank_max_over_mean(torch.ones(2, E), alone) == [None, None]
    assert rows_sent(torch.ones(2, E), torch.zeros(2, 0), alone) == [{}, {}]
