"""``benchmarks/goals.py``: which figures meet a goal, and the file that it reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from bench_cases import figures, measured

from ezpz_moe.tools.bench.results import SINGLE_BUFFER, Measured, document
from ezpz_moe.tools.bench.shapes import Shape

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import goals
from goals import GOALS, judged

MIXTRAL = Shape("8,1024,3584,2048", 8, 1024, 3584, 2048)
OLMOE = Shape("olmoe/4", 64, 512, 256, 8192)


def verdict(it: Measured, start: str) -> str:
    (line,) = (line for line in judged(it) if line.startswith(start))
    return line


@pytest.mark.parametrize(("speed", "word"), [(2.0, "met"), (1.9, "MISSED")])
def test_a_goal_of_speed(speed: float, word: str) -> None:
    them = {"for_loop": figures(10), "indexed": figures(10 * speed)}
    line = verdict(measured(them, shape=MIXTRAL), "for_loop")
    assert line == f"for_loop: {speed:g} x the speed of indexed, goal >= 2: {word}"


@pytest.mark.parametrize(("time", "word"), [(13, "met"), (14, "MISSED")])
def test_a_goal_of_time(time: float, word: str) -> None:
    them = {"for_loop": figures(time), "dense": figures(10)}
    there = {"shape": OLMOE, "allocator": "retain", "dtype": "float32"}
    line = verdict(measured(them, **there), "for_loop")
    assert line == f"for_loop: {time / 10:g} x the time of dense, goal <= 1.3: {word}"
    assert not list(judged(measured(them, **there | {"allocator": "default"})))
    assert not list(judged(measured(them, **there | {"device": "cuda"})))
    assert not list(judged(measured(them, **there | {"shape": MIXTRAL})))


@pytest.mark.parametrize(("time", "word"), [(12.5, "met"), (13, "MISSED")])
def test_the_goal_of_recomputing(time: float, word: str) -> None:
    name = "for_loop(recompute=true)"
    line = verdict(measured({name: figures(time), "for_loop": figures(10)}), name)
    assert line == f"{name}: {time / 10:.3g} x the time of for_loop, goal <= 1.25: {word}"


@pytest.mark.parametrize(("saved", "word"), [(500, "met"), (501, "MISSED")])
def test_a_goal_of_saved_bytes(saved: int, word: str) -> None:
    them = {"for_loop": figures(2, saved=saved), "stock_products": figures(3, saved=1000)}
    lines = list(judged(measured(them)))
    assert lines[0].endswith("x the speed of stock_products, goal >= 1: met")
    assert lines[1].endswith(f"x the bytes that stock_products saves, goal <= 0.5: {word}")


@pytest.mark.parametrize(("elements", "word"), [(3, "met"), (4, "MISSED")])
def test_a_goal_of_saved_elements(elements: int, word: str) -> None:
    shape = Shape("qwen3_30b/4", 128, 512, 192, 8192)
    them = {"batched_mm_padded": figures(2, saved=elements * 8192 * 192 * 2)}
    line = verdict(measured(them, shape=shape, routing="zipf1"), "batched_mm_padded")
    assert line == f"batched_mm_padded: {elements} x R F elements saved, goal <= 3: {word}"


def test_goals_of_a_gpu() -> None:
    shape = Shape("olmoe", 64, 2048, 1024, 32768)
    milliseconds = shape.flops / 410e12 * 1e3
    them = {"triton": figures(milliseconds, syncs=1), "stock": figures(milliseconds * 1.2)}
    lines = list(judged(measured(them, shape=shape, device="cuda:0")))
    assert [line.rpartition(" ")[2] for line in lines] == ["MISSED", "met", "MISSED"]
    assert lines[1] == "triton: 410 TFLOP/s, goal >= 400: met"
    assert lines[2] == "triton: 1 device-host syncs, goal <= 0: MISSED"


def test_auto_is_judged_by_the_best_of_those_that_drop_nothing() -> None:
    them = {
        "auto": figures(10),
        "slow": figures(20),
        "fast": figures(9),
        "drops": figures(1, dropped=0.5),
        "dense": figures(1),
    }
    it = measured(them, backends=["auto", "slow", "fast", "drops"])
    assert verdict(it, "auto") == "auto: 0.9 x the speed of fast, goal >= 0.95: MISSED"
    assert not list(judged(measured({"auto": figures(1)}, backends=["auto"])))


def test_a_goal_without_its_rival_is_not_judged() -> None:
    assert not list(judged(measured({"for_loop": figures(1)}, shape=MIXTRAL)))
    assert {goal.contender for goal in GOALS} >= {"for_loop", "grouped_mm_fused", "triton"}


def test_a_file_of_bench_is_judged(tmp_path: Path, monkeypatch, capsys) -> None:
    """Also one in which a contender has a former name."""
    old_name = "batched_mm_padded(single_buffer=true)"
    shape = Shape("qwen3_30b/4", 128, 512, 192, 8192)
    them = {"batched_mm_padded": figures(10), old_name: figures(49), "for_loop": figures(9)}
    file = tmp_path / "figures.json"
    found = document([measured(them, shape=shape, routing="zipf1")], {}, "ezpz-moe bench")
    file.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", ["goals.py", str(file)])
    assert goals.main() == 1
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "qwen3_30b/4 zipf1 bfloat16 default: batched_mm_padded: 4.9 x the speed of "
        f"{SINGLE_BUFFER}, goal >= 5: MISSED",
        "qwen3_30b/4 zipf1 bfloat16 default: batched_mm_padded: 0 x R F elements saved, goal <= 3: "
        "met",
    ]
