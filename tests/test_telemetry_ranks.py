"""What `plot` shows of a run with expert parallelism: the load of ranks, rows sent, and pairs."""

import math
from dataclasses import replace

import pytest
from telemetry_cases import layer, record, run

from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.telemetry.plot import plot
from ezpz_moe.telemetry.rank_charts import ranks_over_steps
from ezpz_moe.telemetry.scalars import scalars

OF_RANKS = {
    "rank_max_over_mean": 1.5,
    "rows_dispatched": 8,
    "rows_off_rank": 6,
    "rows_off_node": 2,
    "pairs": ((0, 7, 30), (1, 2, 5)),
    "sampled_tokens": 40,
}


def of_ranks(records, **changed):
    """The records as a run with expert parallelism writes them."""
    return [
        replace(each, layers=tuple(replace(one, **OF_RANKS | changed) for one in each.layers))
        for each in records
    ]


def test_shares_are_of_the_rows_that_are_sent_to_a_rank() -> None:
    """Not of the assignments; and the node only where there are several."""
    values = scalars(record(layer([40, 40], 1, **OF_RANKS)))
    assert (values["moe/off_rank"], values["moe/off_node_worst"]) == (0.75, 0.25)
    alone = layer([40, 40], 1, **OF_RANKS | {"rows_off_node": None})
    assert "moe/off_node" not in scalars(record(alone))
    nothing_sent = layer([40, 40], 1, **OF_RANKS | {"rows_dispatched": 0})
    assert "moe/off_rank" not in scalars(record(nothing_sent))


def test_the_picture_has_the_worst_layer_the_mean_and_the_shares() -> None:
    first, second = of_ranks(run(layers=2, steps=20))
    worse = replace(second.layers[1], rank_max_over_mean=2.5, rows_off_rank=8)
    second = replace(second, layers=(second.layers[0], worse))
    load, sent = ranks_over_steps([first, second]).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in (*load.lines, *sent.lines)}
    assert lines == {
        "worst layer": [1.5, 2.5],
        "mean of layers": [1.5, 2.0],
        "to another rank": [0.75, 0.875],
        "to another node": [0.25, 0.25],
    }
    assert list(load.lines[0].get_xdata()) == [10, 20]


def test_without_expert_parallelism_there_is_no_picture_and_a_gap_where_a_run_had_none() -> None:
    records = run(layers=2, steps=20)
    assert ranks_over_steps(records) is None
    (only_load,) = ranks_over_steps(of_ranks(records, rows_dispatched=None)).axes
    assert len(only_load.lines) == 2
    before, after = (
        ranks_over_steps([records[0], *of_ranks(records[1:])]).axes[0].lines[0].get_ydata()
    )
    assert (math.isnan(before), after) == (True, 1.5)


@pytest.mark.parametrize("has_ranks", [True, False])
def test_the_page_has_them(tmp_path, has_ranks) -> None:
    records = run(layers=2, steps=20)
    for each in of_ranks(records) if has_ranks else records:
        append(tmp_path / "telemetry.jsonl", each)
    plotted = plot(tmp_path)
    assert ("ranks_over_steps.png" in [path.name for path in plotted.paths]) == has_ranks
    page = plotted.paths[-1].read_text()
    assert ("Load of the ranks" in page) == has_ranks
    assert ("<td>0 and 7: 75.0%, 1 and 2: 12.5%</td>" in page) == has_ranks
    assert ("<td>rows that leave their node</td>" in page) == has_ranks
