"""Rows that experts compute and drop, counted by their selector; and its warning, once.

On torchtitan 0.3; ``hosts/test_drops_0_2.py`` and ``test_titan_2026_09.py`` have the others.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from dialect import ON_0_2
from torch.utils.checkpoint import checkpoint

from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.titan.v2026_09 import Titan2026_09

check_host()

if ON_0_2 or type(host()) is Titan2026_09:
    pytest.skip("the tests of this host's experts have their own", allow_module_level=True)

from torchtitan.models.common.moe import GroupedExperts  # noqa: E402
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts  # noqa: E402

from ezpz_moe.hosts.titan.experts import selected  # noqa: E402

COUNTS, ROWS = torch.tensor([5, 0, 11, 16]), 36  # four tail rows

# compute_backend -> tokens given, rows computed, tokens dropped
EXPECTED = {
    "batched_mm_capacity(capacity_factor=1.0)": [32, 4 * 9, 2 + 7],
    "batched_mm_padded(max_padding=9)": [32, 4 * 16, 0],
    "batched_mm_padded(max_padding=0.2)": [32, 5 + 2 * 16, 0],
}


def experts(kind: type, backend: str, *, on: bool = True) -> torch.nn.Module:
    with torch.device("meta"):
        names = list(kind.Config(dim=1, hidden_dim=1, num_experts=1).build().state_dict())
    config = kind.Config(
        dim=32, hidden_dim=48, num_experts=4, param_init=dict.fromkeys(names, torch.nn.init.ones_)
    )
    built = selected(config, backend, "a test").build()
    built.init_states()
    if built.row_counts is not None:
        built.row_counts.on = on
    return built.bfloat16()


def counted(module: torch.nn.Module) -> list[int]:
    return module.row_counts.rows_3.tolist()


def run_plainly(module: torch.nn.Module, x_RD: torch.Tensor) -> torch.Tensor:
    return module(x_RD, COUNTS)


RUNS = {
    "plain": lambda module: partial(run_plainly, module),
    "checkpoint": lambda module: partial(
        checkpoint, partial(run_plainly, module), use_reentrant=False
    ),
    "compiled": lambda module: torch.compile(
        partial(run_plainly, module), backend="aot_eager", fullgraph=True
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("backend", EXPECTED)
@pytest.mark.parametrize("kind", [GroupedExperts, GptOssGroupedExperts])
def test_each_forward_in_training_counts_once(kind, backend, run):
    torch.compiler.reset()
    module = experts(kind, backend)
    forward = run(module)
    x_RD = torch.randn(ROWS, 32, dtype=torch.bfloat16, requires_grad=True)
    for times in (1, 2):
        forward(x_RD).sum().backward()
        assert counted(module) == [times * each for each in EXPECTED[backend]]
    module.eval()
    with torch.no_grad():
        forward(x_RD)
    assert counted(module) == [2 * each for each in EXPECTED[backend]]


def test_nothing_is_counted_that_nobody_reads():
    module = experts(GroupedExperts, "batched_mm_capacity", on=False)
    module(torch.randn(ROWS, 32, dtype=torch.bfloat16), COUNTS)
    assert counted(module) == [0, 0, 0]
    for exact in ("for_loop", "grouped_mm"):
        assert experts(GroupedExperts, exact).row_counts is None


@pytest.mark.parametrize(
    ("backend", "warned"), [("batched_mm_capacity", 1), ("batched_mm_padded", 0)]
)
def test_a_backend_that_drops_is_warned_of_once(backend, warned, caplog):
    x_RD = torch.randn(ROWS, 32, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        module = experts(GroupedExperts, backend)
        for _ in range(3):
            module(x_RD, COUNTS)
    lines = [each.message for each in caplog.records if "drops tokens" in each.message]
    assert len(lines) == warned
    assert all(
        backend in line and "share is drop_rate in telemetry.jsonl" in line for line in lines
    )
