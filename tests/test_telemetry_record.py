"""``telemetry.jsonl``: what is written is read back, and what is not ours is refused."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from telemetry_cases import at, layer, record, run

from ezpz_moe.config.telemetry_schema import AlertThresholds
from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry.json_lines import append, read
from ezpz_moe.telemetry.record import LayerRecord, StepRecord


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "telemetry.jsonl"


def refusal(path: Path) -> str:
    with pytest.raises(EzpzError) as refused:
        read(path)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_line_without_thresholds_has_the_defaults(path: Path) -> None:
    """As lines were before records had them."""
    append(path, record(layer([3, 1]), thresholds=AlertThresholds(alert_dead_steps=7)))
    (line,) = read(path)
    assert line.thresholds.alert_dead_steps == 7
    content = json.loads(path.read_text())
    del content["thresholds"]
    path.write_text(json.dumps(content) + "\n")
    assert read(path) == [replace(line, thresholds=AlertThresholds())]


def test_a_run_is_read_back(path: Path) -> None:
    records = run(layers=2, experts=4, steps=30)
    for each in records:
        append(path, each)
        assert read(path)[-1] == each  # flushed
    assert read(path) == records


figures = st.floats(allow_nan=False)
maybe = st.none() | figures
sizes = st.lists(st.integers(0, 2**62), max_size=4).map(tuple)
losses = st.dictionaries(st.text(max_size=5), figures, max_size=2)
layers = st.builds(
    LayerRecord,
    layer=st.integers(0, 99),
    tokens=st.integers(0, 2**62),
    counts_E=sizes.filter(len),
    zero_counts_Z=sizes,
    top1_probability=figures,
    margin=figures,
    bias_norm=maybe,
    losses=losses,
    scaled_losses=losses,
    padding_waste=maybe,
    drop_rate=maybe,
    rank_max_over_mean=maybe,
    probabilities_E=st.lists(st.floats(0, 1), max_size=3).map(tuple),
    rows_dispatched=st.none() | st.integers(0, 2**62),
    rows_off_rank=st.none() | st.integers(0, 2**62),
    rows_off_node=st.none() | st.integers(0, 2**62),
    pairs=st.lists(st.tuples(*[st.integers(0, 99)] * 3), max_size=2).map(tuple),
    sampled_tokens=st.none() | st.integers(0, 2**62),
)
records = st.builds(
    StepRecord,
    step=st.integers(0, 2**40),
    steps=st.integers(1, 2**40),
    loss=maybe,
    grad_norm=maybe,
    backend=st.text(),
    layers=st.lists(layers, min_size=1, max_size=3).map(tuple),
    time=st.none() | st.datetimes(timezones=st.just(UTC)),
    model=st.text(),
    job=st.text(),
)


@given(records)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # sums of inf and -inf
def test_any_record_is_one_line_and_read_back(tmp_path_factory, one: StepRecord) -> None:
    path = tmp_path_factory.mktemp("any") / "telemetry.jsonl"
    append(path, one)
    assert path.read_bytes().count(b"\n") == 1
    assert read(path) == [one]


def test_a_loss_that_is_not_finite_is_valid_json_and_read_back(path: Path) -> None:
    lost = layer([1, 1], losses={"z_loss": math.nan, "aux_loss": -math.inf})
    append(path, record(lost, loss=math.inf))

    def no_json(constant):
        raise AssertionError(constant)

    line = json.loads(path.read_text(), parse_constant=no_json)
    assert (line["loss"], line["layers"][0]["losses"]["z_loss"]) == ("Infinity", "NaN")
    (back,) = read(path)
    assert back.loss == math.inf
    assert math.isnan(back.layers[0].losses["z_loss"])
    assert back.layers[0].losses["aux_loss"] == -math.inf


def test_the_line_carries_format_and_figures_for_jq(path: Path) -> None:
    append(path, record(layer([3, 1], 2), layer([1, 1], 3), step=7))
    line = json.loads(path.read_text())
    assert (line["format"], line["step"]) == (1, 7)
    assert line["figures"]["cv"] == 0.25
    assert line["figures"]["cv_worst"] == 0.5
    assert [each["figures"]["cv"] for each in line["layers"]] == [0.5, 0]
    assert line["layers"][0]["counts_E"] == [3, 1]


def test_a_resumed_run_replaces_what_it_repeats(path: Path) -> None:
    first, second = record(layer([3, 1])), record(layer([1, 1]))
    attempts = (
        [at(first, step) for step in (10, 20, 30, 40)],
        [at(second, step) for step in (20, 25)],
    )
    for attempt in attempts:
        for each in attempt:
            append(path, each)
    assert read(path) == [at(first, 10), at(second, 20), at(second, 25)]


@pytest.mark.parametrize("left", [1, 5, 12, 60, 300, -3])
def test_a_killed_run_costs_its_last_line_only(path: Path, caplog, left: int) -> None:
    first, second, third = run(layers=1, experts=4, steps=30)
    append(path, first)
    append(path, second)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:left])
    with caplog.at_level(logging.WARNING):
        assert read(path) == [first]
    (said,) = caplog.messages
    assert said == (
        f"{path}, line 2: is truncated, because the run was killed or is still "
        "writing it; left out."
    )
    append(path, third)  # the run is resumed
    caplog.clear()
    assert read(path) == [first, third]
    assert not caplog.messages


def test_only_the_line_end_is_missing(path: Path) -> None:
    first, second = run(layers=1, experts=4, steps=20)
    append(path, first)
    path.write_bytes(path.read_bytes().rstrip())
    assert read(path) == [first]
    append(path, second)
    assert read(path) == [first, second]


def test_a_line_that_is_not_ours_is_kept_when_one_is_added(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("somebody's notes")
    append(path, record(layer([1])))
    assert path.read_text().startswith("somebody's notes\n{")


def test_no_records_yet(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert read(path) == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("step 1 loss 2", "is not JSON"),
        ("", "is not JSON"),
        ("[1]", 'has no "format"'),
        ('{"step": 1}', 'has no "format"'),
        ('{"format": 2}', "has format 2, but this ezpz_moe reads format 1"),
        ('{"format": 1}', "step: Field required"),
        ('{"format": 1, "step": 1, "ste', "is not JSON"),  # cut, but not the last line
    ],
)
def test_what_is_no_record_is_refused_with_its_line(path: Path, line: str, reason: str) -> None:
    append(path, record(layer([1])))
    path.write_text(f"{path.read_text()}{line}\n")
    assert refusal(path).startswith(f"{path}, line 2: {reason}")


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"counts_E": [1, -1]}, "layers.0.counts_E.1"),
        ({"counts_E": []}, "layers.0.counts_E"),
        ({"margin": "high"}, "layers.0.margin"),
        ({"losses": [1.0]}, "layers.0.losses"),
    ],
)
def test_a_wrong_value_is_named(path: Path, changed: dict, key: str) -> None:
    append(path, record(layer([1, 1])))
    line = json.loads(path.read_text())
    line["layers"][0] |= changed
    path.write_text(json.dumps(line) + "\n")
    assert refusal(path).startswith(f"{path}, line 1: {key}: ")


def test_missing_and_unreadable_files(path: Path, caplog) -> None:
    assert refusal(path).startswith(f"{path}: there is no such file. A run whose job or flavor has")
    path.mkdir(parents=True)
    assert refusal(path).startswith(f"{path}: cannot be read: ")
    append(path, record(layer([1])))  # a run goes on without it
    assert f"{path}: cannot be written: " in caplog.text


def test_a_record_that_cannot_be_spelled_leaves_the_file_as_it_was(path: Path) -> None:
    append(path, record(layer([1])))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        append(path, replace(record(layer([1])), loss=object()))
    assert path.read_bytes() == before
