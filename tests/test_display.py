"""Tables that fit a terminal, progress in logs, and JSON: what ``ezpz-moe`` prints with."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import telemetry_cases
from bench_cases import figures, measured
from rich.cells import cell_len
from rich.console import Console

from ezpz_moe import cli
from ezpz_moe.cli import analyze, bench, describe, display, tables, tune, verify
from ezpz_moe.compute.tuning import Measured, Question, Situation
from ezpz_moe.config.flavors import flavor_names
from ezpz_moe.hosts import anatomy_text
from ezpz_moe.hosts.accounting import COMPONENTS, Anatomy, Cost
from ezpz_moe.hosts.titan.relied_on import RELIED_ON
from ezpz_moe.telemetry.summary import layer_rows, over_layers_rows
from ezpz_moe.telemetry.text import words
from ezpz_moe.tools.analysis.drift import Drift
from ezpz_moe.tools.analysis.report import LayerReport, Settings
from ezpz_moe.tools.analysis.tokens import Explained
from ezpz_moe.tools.memory import StageMemory
from ezpz_moe.tools.verify import Row

Rows = Sequence[Mapping[str, Any]]
WIDTHS = (60, 80, 120, 200)
LONGEST_NAME = 40


@pytest.fixture(autouse=True)
def _mode():
    yield
    display.set_mode()


@pytest.fixture
def printed(monkeypatch):
    """Print by a function on a terminal of a width, and return the lines."""

    def at(width: int, what, *arguments, **keywords) -> list[str]:
        screen = io.StringIO()
        console = Console(
            file=screen, width=width, force_terminal=True, color_system=None, highlight=False
        )
        monkeypatch.setattr(display, "output", lambda: console)
        what(*arguments, **keywords)
        return [line.rstrip() for line in screen.getvalue().splitlines()]

    return at


def _analyze() -> Rows:
    report = LayerReport(
        layer="layers.26",
        num_experts=128,
        top_k=8,
        load=[],
        explained=Explained(0.512, 0.101, 0.457, 4000),
        concentration=[0.25, None],
        top_tokens=[],
        dropped=0.1234,
        dropped_by_position=[0.05, 0.2],
        srp=0.512,
        sch=0.731,
        cache_size=16,
        sch_by_size=[],
        cosines=[],
        mean_cosine=0.001,
        max_cosine=None,
        drift=Drift(0.4567, 0.8912),
    )
    return [analyze._row(report, Settings(1.25, 16, 2.0), "16")]


def _bench() -> Rows:
    names = ("stock", "batched_mm_padded(single_buffer=true)", "for_loop(recompute=true)", "dense")
    them = {
        name: figures(1234.5678 + 100 * each, 1300.0, saved=2**31, declares_syncs=True)
        for each, name in enumerate(names)
    }
    return list(bench.rows(measured(them, layer="routed")))


def _anatomy() -> Rows:
    costs = {
        name: Cost(12_345_678_901 * (each + 1), 345_678_901, 9.87e11 * (each + 1))
        for each, name in enumerate(COMPONENTS)
    }
    return list(anatomy_text.rows(Anatomy(costs, 7168, 61, 58, 256, 0, 8)))


def _memory() -> Rows:
    stage = StageMemory(0, dict.fromkeys(COMPONENTS, 2**36), dict.fromkeys(COMPONENTS, 2**35), 8)
    return list(describe._memory_rows([stage]))


def _stages() -> Rows:
    stage = StageMemory(1024, {"embeddings": 2**36}, {"embeddings": 2**35}, 8)
    return list(describe._memory_rows([stage, stage]))


def _verify() -> Rows:
    names = ("grouped_mm_fused", "cpu", "bfloat16", "routed", "one_hot", "clamped_swiglu", True)
    found = [
        Row(*names, "top_scores_TK", 1.23e-05, 4.56e-05, 1.2e-3, 0.999999, "ok"),
        Row(*names, "top_scores_TK", None, None, 1.2e-3, None, "has numbers that are not finite"),
    ]
    return [verify._figures(row) for row in found]


def _tune() -> Rows:
    question = Question("routed", ("for_loop",), "x86", "bfloat16", (128, 2048, 768), False)
    times = Measured({"batched_mm_padded": 1234.5, "for_loop": 2345.6, "grouped_mm": None})
    return [tune._row(Situation(question, 65536, 5), times)]


def _doctor() -> Rows:
    return [
        {"": "holds", "relied on": each.thing, "for": each.used_for}
        for each in RELIED_ON
        if len(each.thing) <= LONGEST_NAME
    ]


def _settings() -> Rows:
    path = "optimizer.param_groups.0.optimizer_kwargs.lr"
    return [
        {"path": path, "value": 0.0008, "default": None},
        {"path": "training.steps", "value": 10000, "default": 100},
        {"path": "override.imports", "value": ["a long list of", "words"] * 9, "default": []},
    ]


def _convert() -> Rows:
    note = "kept: torchtitan 0.3 calls it parallelism.expert_parallel_degree, and it means the same"
    return [
        {"key": "parallelism.expert_parallel_degree", "value": "8", "becomes": note},
        {"key": "training.compile", "value": "true", "becomes": "dropped"},
    ]


def _lint() -> Rows:
    remedy = "replace it by --parallelism.pipeline-parallel-schedule, which takes the same words"
    return [
        {"where": "train_on_64.pbs:1234", "flag": "--a.b", "": "dead", "what to do": remedy},
        {"where": "train_on_64.pbs:8", "flag": "--c.d", "": "alive", "what to do": None},
    ]


def _flavors() -> Rows:
    return [
        {
            "flavor": name,
            "total": "671.03 B",
            "active": "37.55 B",
            "experts": 256,
            "top-k": 8,
            "expert dim": 2048,
            "layers": 61,
            "dim": 7168,
            "attention": "the host's",
            "backend": "grouped_mm_fused",
        }
        for name in flavor_names()
    ]


def _ranks() -> Rows:
    step = "forward and backward, but not the exchange of tokens"
    return [
        {
            "stage": stage,
            "rank": 128 * stage,
            "parameters": "12.34 B",
            "model states": "183.94 GiB",
            "step": step,
        }
        for stage in range(4)
    ]


_RUN = telemetry_cases.run(experts=128, dead=3)
TABLES = {
    "analyze": _analyze,
    "bench": _bench,
    "describe": _anatomy,
    "memory by component": _memory,
    "memory by stage": _stages,
    "verify": _verify,
    "tune": _tune,
    "doctor": _doctor,
    "show": _settings,
    "convert": _convert,
    "lint": _lint,
    "flavors": _flavors,
    "preflight": _ranks,
    "plot": lambda: over_layers_rows(_RUN[-1]),
    "plot by layer": lambda: layer_rows(_RUN[-1]),
}


def _hidden(lines: list[str]) -> str:
    """The headings that the line below a table names, with a comma before and after each."""
    found = re.search(r"\d+ columns? hidden: (.*?) \(wider terminal", " ".join(lines))
    return f", {found[1]}, " if found else ""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_with_every_figure_and_name_whole(name, width, printed) -> None:
    rows = words(TABLES[name]())
    lines = printed(width, display.print_table, rows, title=f"{name}: a title [of] several words")
    assert max(map(cell_len, lines)) <= width
    hidden = _hidden(lines)
    shown = Counter(word for line in lines for word in line.split())
    for heading in rows[0]:
        if f", {heading.replace('_', ' ')}, " not in hidden:
            said = Counter(word for row in rows for word in row[heading].split())
            missing = {word for word in said if shown[word] < said[word]}
            assert not {word for word in missing if len(word) <= LONGEST_NAME}, heading
    assert len(lines) < 5 + len(rows) * 2 * len(rows[0]) + sum(
        sum(cell_len(cell) for cell in row.values()) // 24 for row in rows
    ), "a pillar"


def test_the_backends_of_this_machine_fit(printed) -> None:
    for width in WIDTHS:
        lines = printed(width, cli.main, ["backends", "--device", "cpu"])
        assert max(map(cell_len, lines)) <= width
        assert any(line.startswith("batched_mm_padded ") for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_prose_wraps_between_words_and_what_is_to_be_copied_does_not(width, printed) -> None:
    first = (
        "It has `a command of several words that stays whole` in it; run --a-flag [of] " + "x " * 60
    )
    lines = printed(width, display.print_line, f"\n{first}\n  {first}")
    assert max(map(cell_len, lines)) <= width
    assert lines[0] == ""
    assert sum("`a command of several words that stays whole`" in line for line in lines) == 2
    assert " ".join(" ".join(lines).split()) == " ".join(f"{first} {first}".split())
    assert all(line.startswith("  ") for line in lines[2:]), "where the next begins shows"
    command = f"ezpz-moe {first}".strip()
    assert printed(width, display.print_whole, command) == [command]


WIDE = [{"name": "a", "x": "1234567890", "y": "2234567890", "z": "3234567890", "w": "9"}]


def test_the_least_important_columns_go_first(printed) -> None:
    assert list(tables.fit(words(WIDE), 39, ["z", "x"])) == ["name", "x", "z"]
    assert list(tables.fit(words(WIDE), 39)) == ["name", "x", "y"]
    assert list(tables.fit(words(WIDE), 31, ["z", "x", "w"])) == ["name", "x", "z", "w"]
    lines = printed(39, display.print_table, WIDE, important=["z", "x"])
    assert " ".join(lines[-2:]) == "2 columns hidden: y, w (wider terminal, or --json)"


def test_what_does_not_fit_in_three_columns_is_a_block_for_each_row(printed) -> None:
    assert tables.fit(words(WIDE), 27) is None
    lines = printed(27, display.print_table, [*WIDE, {**WIDE[0], "name": "b", "y": "x y z"}])
    assert lines[:5] == ["a", "  x  1234567890", "  y  2234567890", "  z  3234567890", "  w  9"]
    assert lines[5:8] == ["b", "  x  1234567890", "  y  x y z"]


def test_a_name_without_room_beside_its_key_stands_below_it(printed) -> None:
    name = "n" * 30
    row = {"first": "f" * 30, "a rather long heading": name, "other": "o o " * 20}
    lines = printed(36, display.print_table, [row])
    assert lines[:3] == ["f" * 30, "  a rather long heading", f"    {name}"]
    assert max(map(cell_len, lines)) <= 36


def test_headings_wrap_before_a_column_goes(printed) -> None:
    rows = [{"name": "a", "first of all": "1", "second of all": "2"}]
    assert tables.fit(rows, 19) == {"name": 4, "first of all": 5, "second of all": 6}
    lines = printed(19, display.print_table, rows)
    assert [line.split() for line in lines[:3]] == [
        ["first"],
        ["of", "second"],
        ["name", "all", "of", "all"],
    ]
    assert lines[-1] == "a         1       2"


def test_a_path_longer_than_its_column_breaks_and_the_table_stays(printed) -> None:
    path = "/".join(["folder"] * 12)
    lines = printed(60, display.print_table, [{"key": "a.b", "value": path}])
    assert max(map(cell_len, lines)) <= 60
    assert "".join("".join(lines[2:]).split()) == f"a.b{path}"


def test_what_is_piped_is_whole(capsys) -> None:
    title = "t" * 300
    display.print_line("x " * 10_000)
    assert len(capsys.readouterr().out.splitlines()) == 1
    display.print_table([{"a": "b", "c": "x y " * 100, "d [e]": "[red]1"}], title=title)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == title
    assert len(lines) == 3
    assert "d [e]" in lines[1]
    assert ("x y " * 100).strip() in lines[2]
    assert "[red]1" in lines[2]


def test_the_memory_of_a_model_has_one_unit_which_no_component_falls_below(printed) -> None:
    weights = {"routed experts": 3 * 2**30, "router": 3 * 2**20, "norms": 0}
    stage = StageMemory(0, weights, {"router": 2**26, "norms": 1}, 1)
    rows = {row["component"]: row for row in describe._memory_rows([stage])}
    assert rows["routed experts"]["weights"] == "3.00 GiB"
    assert (rows["router"]["weights"], rows["router"]["activations"]) == ("<0.01 GiB", "0.06 GiB")
    assert (rows["norms"]["weights"], rows["norms"]["activations"]) == ("0.00 GiB", "<0.01 GiB")
    assert rows["total"]["weights"] == "3.00 GiB"
    lines = printed(120, display.print_table, rows.values())
    assert len({len(line) for line in lines[1:]}) == 1, "figures align right"
    small = StageMemory(0, {"router": 2**20}, {"router": 2**29}, 1)
    units = {cell[-3:] for row in describe._memory_rows([small, stage]) for cell in row.values()}
    assert "MiB" not in units, "stages are compared with each other"
    assert next(iter(describe._memory_rows([small])))["activations"] == "512.00 MiB"


# --- for programs ---------------------------------------------------------------------------------


def test_a_document_is_alone_on_stdout_and_has_no_nan(capsys) -> None:
    display.print_json({"ignored": 1})
    display.set_mode(for_programs=True)
    display.print_line("a line")
    display.print_table([{"a": 1}], title="a title")
    display.print_json({"a": [float("nan"), (1.5, Path("x"))], "b": {"c": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [1.5, "x"]], "b": {"c": None}}


# --- progress -------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """What is said without a terminal, and an event that is set when something is."""
    lines, said = [], Event()

    def say(line: str) -> None:
        lines.append(line)
        said.set()

    monkeypatch.setattr(display, "PATIENCE", 0.01)
    monkeypatch.setattr(display, "print_to_stderr", say)
    return lines, said


def test_a_log_is_told_how_far_the_work_is(told) -> None:
    lines, said = told
    for item in display.tracked(iter("ab"), "Building ranks", total=2):
        if item == "b":
            said.clear()
            assert said.wait(60)
    assert re.fullmatch(r"Building ranks: 1 of 2 done, after \d+ s", lines[-1])


def test_a_log_is_told_which_step_goes_on(told) -> None:
    lines, said = told
    with display.steps("Training", 3) as step:
        step("first")
        step("second")
        said.clear()
        assert said.wait(60)
    assert re.fullmatch(r"Training: second, 2 of 3, after \d+ s", lines[-1])
    with display.status("Reading"):
        said.clear()
        assert said.wait(60)
    assert lines[-1].startswith("Reading, after ")


def test_nobody_is_told_what_is_quick_or_quiet(told, capsys, monkeypatch) -> None:
    lines, said = told
    display.set_mode(quiet=True)
    with display.status("Reading"):
        assert list(display.tracked([1, 2], "Counting")) == [1, 2]
        assert not said.wait(0.05)
    display.set_mode()
    monkeypatch.setattr(display, "PATIENCE", 10.0)
    with display.status("Reading"):
        assert list(display.tracked([1, 2], "Counting")) == [1, 2]
    assert not lines
    assert capsys.readouterr().err == ""
