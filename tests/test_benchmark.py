"""The benchmark runs, and what it times are the same computations. No figure is judged here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from ezpz_moe.compute import backend_names
from ezpz_moe.compute.reference import error_bounds, random_case, relative_error, run, truth

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "expert_backends.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("expert_backends", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("contender", "counts"),
    [("indexed", [5, 4, 4]), ("three_grouped", [5, 4, 4]), ("dense", [13])],
)
def test_every_contender_computes_the_layer(bench, contender: str, counts: list[int]) -> None:
    case = random_case(counts, dim=32, hidden_dim=48)
    true = truth(case)
    bounds = error_bounds(case, true)
    for name, value in run(getattr(bench, contender), case).items():
        assert relative_error(value, true[name]) <= bounds[name]


def test_counts_are_balanced(bench) -> None:
    assert bench.balanced(4, 14) == [4, 4, 3, 3]
    for experts, _, _, rows in bench.GOALS:
        counts = bench.balanced(experts, rows)
        assert (len(counts), sum(counts)) == (experts, rows)
        assert max(counts) - min(counts) <= 1


def test_a_run_prints_and_writes_every_contender(bench, tmp_path: Path, capsys) -> None:
    file = tmp_path / "figures.json"
    bench.main(bench.Options(shapes=((4, 32, 48, 16),), repeats=2, json=file))
    output = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["environment"]["torch"] == torch.__version__
    names = {"indexed", "dense", "torch._grouped_mm", *backend_names()}
    assert [row["dtype"] for row in report["measured"]] == ["bfloat16", "float32"]
    for row in report["measured"]:
        assert set(row["turns"]) == names
        assert all(len(times) == 2 and min(times) > 0 for times in row["turns"].values())
        assert f"for_loop {row['dtype']} (4, 32, 48, 16): " in output
    assert all(name in output for name in names)


def test_ratios_are_taken_within_a_turn(bench) -> None:
    """A machine that becomes three times slower in the second turn, between a and b."""
    measured = bench.Measured("float32", (1, 2, 3, 4), {"a": [2, 2, 6, 6], "b": [1, 3, 3, 3]})
    assert measured.ratio("a", "b") == 2
    assert measured.ratio("a", "c") is None
    assert measured.median("a") == 4
