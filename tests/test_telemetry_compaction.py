"""A file that stays under its limit says the same of the run: totals, alerts and the newest steps.

Legend: E = experts.
"""

import logging
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_cases import layer, record, run

from ezpz_moe.config.telemetry_schema import AlertThresholds
from ezpz_moe.telemetry.alerts import Alerts
from ezpz_moe.telemetry.course import course
from ezpz_moe.telemetry.json_lines import append, read
from ezpz_moe.telemetry.merging import joined

LIMIT = 60_000
"""Bytes; a line of the cases below has about 1900, and more with alerts."""


def troubled(number: int, seed: int, changes: int | None = None) -> list:
    """Records whose routers go wrong and recover: experts starve, loads grow uneven, some collapse.

    From record ``changes`` on, another setting is in force.
    """
    random = np.random.default_rng(seed)
    thresholds = AlertThresholds(alert_dead_steps=3, alert_cv_rise=1.2, alert_collapse=0.4)
    records = []
    for step in range(1, number + 1):
        # A mood lasts for some records, so that running means and idle steps matter.
        mood = np.random.default_rng([seed, step // 7])
        taste_LE = mood.choice([0.0, 0.5, 1.0, 6.0], size=(1, 6)) + 1e-9
        counts_LE = [random.multinomial(200, each / each.sum()) for each in taste_LE]
        layers = [
            layer(
                counts_E,
                number + 1,
                top1_probability=float(random.random()),
                rows_dispatched=int(random.integers(9)),
                rows_off_rank=1,
            )
            for number, counts_E in enumerate(counts_LE)
        ]
        of_run = {"router.jitter": 0.1} if changes and step > changes else {}
        more = {"thresholds": thresholds, "warmup_steps": 4, "settings": of_run}
        records.append(record(*layers, step=step, steps=1, **more))
    return records


def alerts_of(records) -> list:
    watch = Alerts()
    return [alert for each in records for alert in watch.raised(each)]


def totals(records) -> Counter:
    """Everything that is added up, by layer."""
    sums: Counter = Counter()
    for each in records:
        sums["steps"] += each.steps
        for one in each.layers:
            sums[one.layer, "tokens"] += one.tokens
            sums[one.layer, "rows"] += one.rows_dispatched or 0
            sums.update({(one.layer, e): int(n) for e, n in enumerate(one.counts_E)})
    return sums


def changed_at(records) -> list[int]:
    """The steps after which other settings are in force."""
    return [one.step for one, two in pairwise(records) if one.settings != two.settings]


def written(path: Path, records, limit: int = LIMIT) -> list[int]:
    """Append the records; the sizes that the file had."""
    sizes = []
    for each in records:
        append(path, each, limit)
        sizes.append(path.stat().st_size)
    return sizes


@settings(max_examples=6)
@given(st.integers(1, 90), st.integers(0, 2**32), st.none() | st.integers(1, 90))
def test_a_compacted_file_has_the_same_totals_and_alerts(
    tmp_path_factory, number: int, seed: int, changes: int | None
) -> None:
    path = tmp_path_factory.mktemp("compacted") / "telemetry.jsonl"
    records = troubled(number, seed, changes)
    sizes = written(path, records)
    kept = read(path)
    assert totals(kept) == totals(records)
    assert alerts_of(kept) == alerts_of(records)
    assert course(path).alerts == alerts_of(records)
    assert max(sizes) <= 1.25 * LIMIT
    # One record goes on where the other ends, and none mixes two settings.
    assert all(two.step - two.steps == one.step for one, two in pairwise(kept))
    assert changed_at(kept) == changed_at(records)
    # The newest are as they were written.
    assert kept[-4:] == records[-4:]
    merged = [each for each in kept if each.merged]
    assert bool(merged) == (max(sizes) > LIMIT or len(kept) < number)
    assert all(each.merged.records == each.steps for each in merged)


def test_after_a_long_run_older_records_cover_about_equally_many_steps(tmp_path) -> None:
    path = tmp_path / "telemetry.jsonl"
    written(path, troubled(150, 0, changes=60))
    steps = [each.steps for each in read(path)]
    assert steps[-4:] == [1] * 4
    older = [each for each in steps if each > 1]
    assert len(older) >= 10
    assert max(older) <= 4 * sum(older) / len(older)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_resumes_goes_on_from_what_is_left(tmp_path) -> None:
    """From a step that is not merged yet: the abandoned attempt is gone, and its alerts."""
    path = tmp_path / "telemetry.jsonl"
    first, second = troubled(120, 1), troubled(160, 2)
    written(path, first)
    assert any(each.merged for each in read(path))
    written(path, second[115:])
    expected = first[:115] + second[115:]
    assert totals(read(path)) == totals(expected)
    assert alerts_of(read(path)) == alerts_of(expected)


def test_a_resumed_run_that_goes_far_back_loses_no_more_than_the_record_it_goes_into(
    tmp_path,
) -> None:
    path = tmp_path / "telemetry.jsonl"
    first, second = troubled(120, 1), troubled(160, 2)
    written(path, first)
    before = next(each for each in read(path) if each.steps > 1)
    into = before.step - 1  # of the steps of a merged record
    written(path, second[into:])
    kept = read(path)
    assert kept[0].step - kept[0].steps == into
    assert totals(kept) == totals(second[into:])
    assert alerts_of(kept) == alerts_of(second[into:])


def test_who_reads_meanwhile_reads_whole_lines(tmp_path) -> None:
    path = tmp_path / "telemetry.jsonl"
    records = troubled(60, 3)
    appended = iter(records)
    sizes = [0]
    while sizes[-1] <= LIMIT * 0.97:
        sizes += written(path, [next(appended)])
    whole = path.read_bytes()
    with path.open("rb") as reader:
        half = reader.read(len(whole) // 2)
        written(path, list(appended)[:8])
        assert len(read(path)) < 60
        assert (half + reader.read())[: len(whole)] == whole


def test_a_full_disk_leaves_the_file_and_the_run_as_they_are(tmp_path, caplog) -> None:
    path = tmp_path / "telemetry.jsonl"
    records = troubled(60, 4)
    partial = path.with_name("telemetry.jsonl.partial")
    with caplog.at_level(logging.WARNING):
        for each in records:
            if not partial.is_symlink():
                partial.symlink_to("/dev/full")
            append(path, each, LIMIT)
    assert read(path) == records
    assert f"{path}: has more than 0.06 MB and cannot be compacted: No space left" in caplog.text
    assert "The run goes on, and the file grows until" in caplog.text
    assert len(caplog.records) == 1
    append(path, troubled(61, 4)[-1], 1000)
    assert alerts_of(read(path)) == alerts_of(troubled(61, 4))


def test_a_foreign_line_ends_no_run(tmp_path, caplog) -> None:
    path = tmp_path / "telemetry.jsonl"
    path.write_text("somebody's notes\n")
    with caplog.at_level(logging.WARNING):
        written(path, troubled(45, 5))
    assert "line 1: is not JSON" in caplog.text
    assert path.read_text().startswith("somebody's notes\n")
    assert len(path.read_text().splitlines()) == 46


def test_a_joined_record_has_the_means_of_its_parts() -> None:
    """Weighted: over tokens, over assignments, over steps; a part without tokens has no weight."""
    one = layer([4, 0], margin=1.0, losses={"z_loss": 1.0}, drop_rate=0.5, bias_norm=1.0)
    one = replace(one, probabilities_E=(0.8, 0.2), rank_max_over_mean=2.0, sampled_tokens=3)
    other = layer([6, 6], margin=0.2, losses={"z_loss": 4.0}, drop_rate=None, bias_norm=3.0)
    other = replace(other, probabilities_E=(0.4, 0.6), rank_max_over_mean=1.0)
    nobodys = layer([0, 0], margin=math.nan, losses={"z_loss": 0.0})
    parts = [
        record(each, step=step, steps=steps)
        for each, step, steps in ((one, 1, 1), (other, 3, 2), (nobodys, 6, 3))
    ]
    (two,) = joined(parts[:2]).layers
    assert two.margin == pytest.approx(0.4)
    assert two.losses["z_loss"] == pytest.approx(3.0)
    assert (two.drop_rate, two.bias_norm, two.sampled_tokens) == (0.5, 3.0, 3)
    assert two.rank_max_over_mean == pytest.approx(1.25)
    assert two.probabilities_E == (0.5, 0.5)
    three = joined(parts)
    assert (three.step, three.steps) == (6, 6)
    assert three.layers[0].margin == two.margin


def test_a_course_of_many_records_joins_them_and_keeps_the_last_whole(tmp_path) -> None:
    path = tmp_path / "telemetry.jsonl"
    records = [
        replace(each, layers=tuple(replace(one, probabilities_E=(0.1,) * 6) for one in each.layers))
        for each in troubled(100, 6, changes=33)
    ]
    written(path, records, 10**9)
    found = course(path, most=8)
    assert len(found.records) < 20
    assert found.number == 100
    assert totals(found.records) == totals(records)
    assert found.records[-1] == records[-1]
    assert found.alerts == alerts_of(records)
    assert changed_at(found.records) == [33]
    few = course(path, most=200)
    assert [each.step for each in few.records] == list(range(1, 101))


def test_a_course_of_few_records_is_that_of_the_file(tmp_path) -> None:
    path = tmp_path / "telemetry.jsonl"
    records = run(layers=2, steps=50)
    written(path, records)
    assert course(path).records[-1] == records[-1]
    assert totals(course(path).records) == totals(records)
