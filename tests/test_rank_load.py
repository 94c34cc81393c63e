"""The load of ranks under expert parallelism, of four ranks in two groups. Over gloo.

Legend: L = layers, E = experts.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dialect import ON_0_2

if ON_0_2:
    pytest.skip("[telemetry] needs torchtitan 0.3 or later", allow_module_level=True)

pytestmark = [pytest.mark.ranks, pytest.mark.usefixtures("forked_processes")]

GROUPS, RANKS, E = 2, 2, 4
COUNTS_GRLE = [
    [[[9, 0, 1, 1], [0, 0, 0, 0]], [[9, 3, 2, 2], [0, 0, 0, 0]]],
    [[[0, 1, 1, 7], [0, 0, 0, 0]], [[2, 2, 4, 4], [0, 0, 0, 0]]],
]
"""Of the tokens of each rank, in two layers; nobody has any in the second."""


def part(rank: int, folder: Path) -> None:
    """Writes what one of the ranks finds."""
    from ezpz_moe.hosts.titan.rank_load import rank_max_over_mean

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=GROUPS * RANKS
    )
    world = torch.distributed.init_device_mesh("cpu", (GROUPS * RANKS,))
    groups = torch.distributed.init_device_mesh(
        "cpu", (GROUPS, RANKS), mesh_dim_names=("efsdp", "ep")
    )
    dims = SimpleNamespace(ep_enabled=True)
    dims.get_optional_mesh = {"ep": groups["ep"], "loss": world}.get
    counts_LE = torch.tensor(COUNTS_GRLE).flatten(0, 1)[rank]
    torch.save(rank_max_over_mean(counts_LE, dims), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_busiest_rank_of_all_groups(tmp_path):
    """A group sends to its own ranks alone: over all groups the two halves are even here."""
    torch.multiprocessing.spawn(part, (tmp_path,), nprocs=GROUPS * RANKS)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(GROUPS * RANKS)]
    loads = [
        sum(of_rank[0][expert] for of_rank in group for expert in experts)
        for group in COUNTS_GRLE
        for experts in ([0, 1], [2, 3])
    ]
    assert loads == [21, 6, 5, 16]
    assert found == [[max(loads) / (sum(loads) / 4), None]] * 4


def test_without_expert_parallelism_there_is_none():
    from ezpz_moe.hosts.titan.rank_load import rank_max_over_mean

    alone = SimpleNamespace(get_optional_mesh=lambda name: None)
    assert rank_max_over_mean(torch.ones(2, E), alone) == [None, None]
