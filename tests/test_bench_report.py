"""What is made of the figures of ``ezpz-moe bench``: ratios, the table, the file, pictures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from bench_cases import figures, measured
from pydantic import TypeAdapter

from ezpz_moe.cli.bench import left_out, remarks, rows, title
from ezpz_moe.tools.bench.plots import _picture, draw
from ezpz_moe.tools.bench.results import Measured, document
from ezpz_moe.tools.bench.shapes import Shape


def test_ratios_are_taken_within_a_turn() -> None:
    """A machine that becomes three times slower in the second turn, between a and b."""
    both = measured({"a": figures(2, 2, 6, 6), "b": figures(1, 3, 3, 3)})
    assert both.time_ratio("a", "b") == 2
    assert both.time_ratio("a", "c") is None
    assert both.time_ratio(None, "a") is None
    assert both.figures["a"].median() == 4
    assert both.figures["a"].median("forward") == pytest.approx(4 / 3)


def test_the_spread_is_that_of_the_middle_half() -> None:
    assert figures(1, 2, 3, 4, 100).quartiles() == (2, 4)
    assert figures(7).quartiles() == (7, 7)


def test_the_hosts_products_stand_for_its_layer() -> None:
    one = figures(1)
    assert measured({"stock": one, "stock_products": one}).stock == "stock"
    assert measured({"stock_products": one}).stock == "stock_products"
    assert measured({"dense": one}).stock is None


def test_a_table_has_the_fastest_first() -> None:
    them = {
        "stock": figures(4, 4, 4, saved=3 * 2**20),
        "z_mine": figures(2, 2, 5, syncs=3),
        "dense": figures(1, 1, 1, declares_syncs=False, peak=None),
    }
    table = list(rows(measured(them)))
    assert [row["contender"] for row in table] == ["dense", "z_mine", "stock"]
    mine = table[1]
    assert mine["fwd+bwd ms"] == "2"
    assert mine["quartiles"] == "2-3.5"
    assert mine["speed / stock"] == "2.00"
    assert mine["time / dense"] == "2.00"
    assert mine["syncs"] == "3"
    assert table[0]["syncs"] == "no (declared)"
    assert table[0]["peak"] == "-"
    assert table[2]["saved"] == "3.00 MiB"


def test_flops_are_18_R_D_F() -> None:
    assert measured({"a": figures(2)}).tflops("a") == pytest.approx(18 * 8 * 3 * 5 / 2e-3 / 1e12)


def test_the_title_says_sizes_skew_and_allocator() -> None:
    it = measured({}, counts=[2, 6], allocator_variables={"MALLOC_TOP_PAD_": "1"})
    assert title(it) == (
        "tiny (E=2 D=3 F=5 R=8), balanced: 2 to 6 rows per expert, the busiest with 1.5x the mean; "
        "bfloat16, allocator default (MALLOC_TOP_PAD_=1)"
    )


def test_refusals_failures_and_drops_are_one_line_each() -> None:
    it = measured(
        {"drops": figures(1, dropped=0.25), "keeps": figures(1)},
        left_out={"peer": ["not installed", "no GPU"]},
        failed={"broken": "RuntimeError: no kernel"},
    )
    assert list(left_out(it)) == ["left out: peer: not installed; no GPU"]
    told = list(remarks(it))
    assert told[0] == "FAILED: broken: RuntimeError: no kernel"
    assert told[1].startswith("drops: drops 25.0%")
    assert len(told) == 2


def test_a_document_can_be_read_again() -> None:
    """The turns are there and the summary is made of them."""
    it = measured({"a": figures(3.14159265, 2, 5), "dense": figures(1, 1, 1)})
    read = document([it], {"threads": 2}, "ezpz-moe bench")
    assert read["command"] == "ezpz-moe bench"
    assert read["environment"] == {"threads": 2}
    (there,) = read["measured"]
    assert there["figures"]["a"]["both_ms"] == [3.1416, 2, 5]
    assert there["figures"]["a"]["summary"]["both_ms"] == 3.1416
    assert there["figures"]["a"]["summary"]["time_of_dense"] == 3.1416
    for each in there["figures"].values():
        del each["summary"]
    again = TypeAdapter(Measured).validate_python(there)
    assert again.figures["dense"].both_ms == it.figures["dense"].both_ms
    assert (again.shape, again.counts) == (it.shape, it.counts)


def skewed() -> list[Measured]:
    """Two shapes; the first with three routings, given in no order."""
    them = {"a": figures(2, peak=2**21), "dense": figures(1, peak=2**20)}
    slow = {"a": figures(8, peak=2**23), "dense": figures(1, peak=2**20)}
    return [
        measured(slow, routing="one_hot", counts=[8, 0]),
        measured(them, routing="balanced", counts=[4, 4]),
        measured(them | {"b": figures(4)}, routing="zipf1", counts=[3, 5]),
        measured(them, shape=Shape("other", 2, 3, 5, 8)),
    ]


def test_pictures_show_what_was_measured() -> None:
    bars, time, memory = _picture(skewed()).axes
    assert [round(float(bar.get_height()), 6) for bar in bars.patches][:2] == [2, 2]
    assert [tick.get_text().split("\n")[0] for tick in bars.get_xticklabels()] == ["tiny", "other"]
    assert [tick.get_text() for tick in time.get_xticklabels()] == [
        "balanced\n1x",
        "zipf1\n1.25x",
        "one_hot\n2x",
    ]
    lines = {line.get_label(): list(line.get_ydata()) for line in time.lines}
    assert lines["a"] == [2, 2, 8]
    assert lines["dense"] == [1, 1, 1]
    assert lines["b"][1] == 4
    assert lines["b"][0] != lines["b"][0], "not measured there"
    lines = {line.get_label(): list(line.get_ydata()) for line in memory.lines}
    assert lines["a"] == [2, 2, 8], "MiB"


def test_axes_are_linear_and_begin_at_zero() -> None:
    """Beside ratios there is a line at 1."""
    bars, *others = _picture(skewed()).axes
    for axes in (bars, *others):
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim()[0] == 0
    assert [list(line.get_ydata()) for line in bars.lines] == [[1, 1]]


def test_what_would_flatten_all_else_is_cut_off_and_written() -> None:
    fast, slow = figures(2, peak=2**20), figures(1000, peak=None)
    them = {"a": fast, "b": fast, "dense": fast}
    far = [
        measured(them, counts=[4, 4]),
        measured(them | {"a": slow, "b": figures(1200)}, routing="one_hot", counts=[8, 0]),
    ]
    _, time, memory = _picture(far).axes
    assert time.get_ylim() == (0, 6)
    assert [text.get_text() for text in time.texts] == ["1,000 ↑", "1,200 ↑"]
    assert len({text.xyann for text in time.texts}) == 2  # one below the other
    assert not memory.texts


def test_pictures_without_a_limit_are_in_milliseconds() -> None:
    (bars,) = _picture([measured({"a": figures(7)})]).axes
    assert bars.patches[0].get_height() == 7
    assert bars.get_ylabel() == "ms"


def test_one_file_for_each_dtype_and_allocator(tmp_path: Path) -> None:
    one = measured({"a": figures(7)})
    other = measured({"a": figures(7)}, dtype="float32", allocator="retain")
    assert draw([one], tmp_path / "one.png") == [tmp_path / "one.png"]
    files = draw([one, other], tmp_path / "two.png")
    assert [file.name for file in files] == ["two-bfloat16-default.png", "two-float32-retain.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_file_of_figures_is_drawn_again(tmp_path: Path, capsys) -> None:
    """As `scripts/draw_benchmarks.py` does with those of docs/internals/benchmarks."""
    script = Path(__file__).parent.parent / "scripts" / "draw_benchmarks.py"
    file = tmp_path / "figures.json"
    of_both = [measured({"a": figures(3), "dense": figures(1)})]
    file.write_text(json.dumps(document(of_both, {}, "ezpz-moe")))
    runpy.run_path(str(script))["main"]([file])
    assert capsys.readouterr().out == f"{tmp_path / 'figures.png'} drawn\n"
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
