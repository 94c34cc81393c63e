"""A backend beside everything of the host's: each combination as docs/internals/hosts.md says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from absent_packages import GATED_DELTA_NET, IMAGES, stand_in
from neighbour_cases import (
    BESIDE,
    DISPATCHERS,
    DOORS,
    MODELS,
    REFUSALS,
    WORKS,
    Cell,
    cells,
    tried,
)

from ezpz_moe.compute import backend_names

DOCUMENT = Path(__file__).parent.parent / "docs" / "internals" / "hosts.md"
EVERY = {
    "model": tuple(MODELS),
    "door": DOORS,
    "backend": tuple(backend_names()),
    "beside": BESIDE,
    "dispatcher": DISPATCHERS,
}
# Each meets what no other does. The columns: model, door, backend, beside, dispatcher.
IN_SHORT = {
    Cell("deepseek_v3", "flavor", "for_loop", "nothing", "deepep"),
    Cell("kimi_k2_7", "flavor", "batched_mm_padded", "fused_swiglu", "hybridep"),
    Cell("qwen3_5", "flavor", "auto", "nothing", "standard"),
    Cell("deepseek_v3 with MTP", "flavor", "grouped_mm", "nothing", "standard"),
    Cell("qwen3", "flavor", "for_loop", "float8 linears", "standard"),
    Cell("gpt_oss", "flavor", "npu", "fused_grouped_experts", "minimal_async_ep"),
    Cell("deepseek_v3 with MTP", "override", "grouped_mm_fused", "fused_swiglu", "standard"),
    Cell("qwen3_5", "override", "batched_mm_capacity", "nothing", "minimal_async_ep"),
    Cell("kimi_k2_7", "override", "triton", "nothing", "hybridep"),
    Cell("gpt_oss", "override", "for_loop", "fused_grouped_experts", "deepep"),
}


def rows() -> Iterator[tuple[dict[str, set[str]], str]]:
    """Of every row of the table the values that it stands for, and what it says."""
    text = DOCUMENT.read_text()
    found = re.search(r"<!-- neighbours: begin -->\n(.*?)<!-- neighbours: end", text, re.DOTALL)
    assert found
    lines = [
        [word.strip() for word in line.strip("|\n").split("|")] for line in found[1].splitlines()
    ]
    *columns, last = lines[0]
    assert last == "what happens"
    for *values, how in lines[2:]:
        named = zip(columns, values, strict=True)
        yield (
            {
                name: set(EVERY[name] if value == "every" else value.split(", "))
                for name, value in named
            },
            how,
        )


ROWS = list(rows())


def said_of(cell: Cell) -> str:
    values = cell._asdict()
    (how,) = (how for row, how in ROWS if all(values[name] in row[name] for name in row))
    return how


def test_the_table_has_every_combination_once():
    """And nothing that the host, or we, no longer have."""
    every = list(cells(with_torchao=True))
    for cell in every:
        assert said_of(cell) in (WORKS, *REFUSALS.values())
    assert set(every) >= IN_SHORT
    for row, _ in ROWS:
        for name, values in row.items():
            assert values <= set(EVERY[name])


@pytest.fixture(scope="module", autouse=True)
def _absent_packages() -> Iterator[None]:
    with stand_in(*GATED_DELTA_NET, *IMAGES):
        yield


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id="-".join(cell), marks=() if cell in IN_SHORT else pytest.mark.full)
        for cell in cells(with_torchao=False)
    ],
)
def test_a_combination_comes_to_what_the_table_says(cell, tmp_path):
    assert tried(cell, tmp_path) == said_of(cell)
