"""A sequence that two ranks share out has the balance loss, gradient and counts of one rank's.

Over gloo, and without a trainer: no host's context parallelism runs on the CPU
(docs/internals/hosts.md).
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dialect import SINCE_2026_08
from router_cases import B, L, router_of, small_model, tokens

from ezpz_moe.config.routing_schema import Balance

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.usefixtures("forked_processes"),
    pytest.mark.skipif(SINCE_2026_08, reason="refused: sequences are folded"),
]

RANKS = 2
SCOPES = ("sequence", "batch", "global")
TABLES = """
[balance]
aux_loss = 0.3
mse_loss = 7.0
z_loss = 0.02
scope = "{scope}"
"""


def case(folder: Path, scope: str):
    """A router far from even, and tokens."""
    folder.mkdir()
    router = router_of(small_model(folder, TABLES.format(scope=scope)))
    with torch.no_grad():
        router.gate.weight.mul_(20)
    return router, tokens(router.gate.in_features)


def result(router, x_BLD) -> tuple[torch.Tensor, ...]:
    """Gradients of the gate and of the tokens, counts and sums; the trainer's loss is left out."""
    x_BLD = x_BLD.clone().requires_grad_()
    weights, _, _ = router(x_BLD)
    (weights * 0).sum().backward()
    return router.gate.weight.grad, x_BLD.grad, router.counts_E, router.sums_S


def groups(scope: str, cp_mesh=None):
    """As a trainer would say them to its routers."""
    dims = SimpleNamespace(
        dp_replicate=1, dp_shard=1, tp=1, ep_enabled=False, spmd_backend="partial_dtensor"
    )
    dims.get_optional_mesh = {"cp": cp_mesh, "loss": cp_mesh}.get
    training = SimpleNamespace(global_batch_size=-1, local_batch_size=B, seq_len=L)
    parallelism = SimpleNamespace(pipeline_parallel_degree=1)
    from ezpz_moe.hosts.titan.routing import _groups

    return _groups(Balance(scope=scope), dims, training, parallelism)


def part(rank: int, folder: Path) -> None:
    """Writes what one of the ranks finds."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS
    )
    mesh = torch.distributed.init_device_mesh("cpu", (RANKS,))
    found = {}
    for scope in SCOPES:
        router, x_BLD = case(folder / f"{scope}.{rank}", scope)
        router.groups = groups(scope, mesh)
        found[scope] = result(router, x_BLD[:, rank::RANKS])
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory, forked_processes):
    """What each rank finds."""
    folder = tmp_path_factory.mktemp("parts")
    torch.multiprocessing.spawn(part, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_shared_sequence_is_one_sequence(parts, tmp_path, scope):
    router, x_BLD = case(tmp_path / "whole", scope)
    router.groups = groups(scope)
    gate, tokens_BLD, counts_E, sums_S = result(router, x_BLD)

    of_gate, of_tokens, of_counts, of_sums = zip(*(each[scope] for each in parts), strict=True)
    together_BLD = torch.stack(of_tokens, dim=2).flatten(1, 2)  # the ranks have had turns
    for ours, expected in ((sum(of_gate), gate), (together_BLD, tokens_BLD)):
        assert expected.abs().max() > 0
        # Sums over half of the tokens each, in float32: as in the test of the written-out loss.
        assert (ours - expected).abs().max() <= 100 * 2**-24 * expected.abs().max()
    assert torch.equal(sum(of_counts), counts_E)
    torch.testing.assert_close(sum(of_sums), sums_S, rtol=1e-5, atol=0)
