"""Pictures of expert load: what their colours say, and that no record is too odd to be drawn."""

from __future__ import annotations

import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from telemetry_cases import at, layer, record, run

from ezpz_moe.telemetry import charts
from ezpz_moe.telemetry.look import DARK, LIGHT, Look, png, svg
from ezpz_moe.telemetry.page import _STYLE

# Twenty experts: cells without figures in them, so that a cell is of one colour.
EVEN = [100] * 20
CELL = 1000  # pixels that a cell has at least


def colours(image: bytes) -> Counter[tuple[int, int, int]]:
    """How many pixels each colour has."""
    pixels = (imread(io.BytesIO(image))[:, :, :3] * 255).round().astype(int)
    return Counter(map(tuple, pixels.reshape(-1, 3).tolist()))


def colour_of(load: float) -> tuple[int, int, int]:
    """The documented scale: RdBu without its ends over log2 of the load, from 1/4 to 4."""
    place = (min(max(math.log2(load), -2), 2) + 2) / 4
    red, green, blue, _ = colormaps["RdBu_r"](0.1 + 0.8 * place)
    return round(red * 255), round(green * 255), round(blue * 255)


def area(image: bytes, colour: tuple[int, int, int]) -> int:
    """Pixels of this colour, but for the steps of two colour maps of 256 colours."""
    return sum(
        number
        for other, number in colours(image).items()
        if max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= 5
    )


def over_steps(records) -> Figure:
    return charts.load_over_steps(records, charts.loads_by_step(records))


def cv(records, look: Look = LIGHT) -> Figure:
    return charts.cv_over_steps(records, charts.cv_by_step(records), look)


def loss(records) -> Figure | None:
    return charts.loss_and_balance(records, charts.cv_by_step(records))


def drawn(*counts: list[int]) -> bytes:
    return png(charts.load_heat_map(record(*(layer(c, n) for n, c in enumerate(counts, start=1)))))


@pytest.mark.parametrize("load", [0.5, 2.0, 3.0])
def test_a_load_has_one_colour_in_every_picture(load: float) -> None:
    """Whatever the other experts, the layers and the number of tokens."""
    count = 1900 * load / (20 - load)  # beside 19 others with 100 each: count = load * mean
    one = drawn([round(1000 * count), *[100_000] * 19])
    two = drawn([round(10 * count), *[1000] * 19], [1] + [0] * 19)
    for image in (one, two):
        assert area(image, colour_of(load)) > CELL


def test_the_loggers_picture_has_the_colours_and_no_more() -> None:
    """Layers of four and two experts, one of them dead."""
    pixels = charts.load_pixels(record(layer([100, 100, 200, 0], 3), layer([100, 100], 7)))
    assert (pixels.shape, pixels.dtype) == ((2 * 32, 4 * 32, 3), np.uint8)
    cells = pixels.reshape(2, 32, 4, 32, 3).swapaxes(1, 2)
    assert (cells == cells[:, :, :1, :1]).all()
    for cell, load in {(0, 0): 1, (0, 2): 2, (1, 0): 1, (1, 1): 1}.items():
        assert np.abs(cells[cell][0, 0].astype(int) - colour_of(load)).max() <= 5
    assert (cells[0, 3] == 0).all()
    assert (cells[1, 2:] == round(0.85 * 255)).all()


def test_the_loggers_picture_fits_a_screen_but_for_many_experts() -> None:
    wide, wider = (charts.load_pixels(record(layer([1] * E))) for E in (256, 512))
    assert (wide.shape, wider.shape) == ((4, 1024, 3), (4, 2048, 3))


def test_the_caption_says_what_rows_and_columns_are() -> None:
    said = charts.caption(record(layer([1, 1], 3), layer([1, 1, 1], 7)))
    assert "Rows: layers 3 to 7, from above; columns: experts 0 to 2." in said


def test_even_load_is_white_and_too_much_is_the_end_of_the_scale() -> None:
    most_common = colours(drawn(EVEN)).most_common(2)
    assert all(min(colour) > 240 for colour, _ in most_common)
    twelve_times = drawn([3000, *EVEN[1:]])
    assert area(twelve_times, colour_of(4)) > CELL


def test_dead_experts_are_black_cells() -> None:
    """An expert with a single token is not dead, and has the end of the scale."""
    none, one, two = (
        area(drawn(counts), (0, 0, 0)) for counts in (EVEN, [0, *EVEN[1:]], [0, 0, *EVEN[2:]])
    )
    cell = one - none
    assert cell > CELL
    assert two - one == pytest.approx(cell, rel=0.25)  # the title's words, and a pixel at the edge
    assert area(drawn([1, *EVEN[1:]]), (0, 0, 0)) == pytest.approx(none, abs=cell / 10)


def test_one_dead_expert_of_256_is_seen_over_the_steps() -> None:
    alive, dead = [10] * 256, [10] * 128 + [0] + [10] * 127
    before, after = (
        png(over_steps([at(record(layer(counts)), step) for step in (10, 20, 30)]))
        for counts in (alive, dead)
    )
    # A line across the panel; the words of the legend are some hundred pixels.
    assert area(after, (0, 0, 0)) - area(before, (0, 0, 0)) > 600


def test_columns_are_sums_of_records() -> None:
    random = np.random.default_rng(0)
    records = [
        at(record(layer(random.multinomial(100, [1 / 4] * 4)), steps=5), 5 * number)
        for number in range(1, 12)
    ]
    load_ES, edges = charts.load_by_step(records, 1, columns=4)
    groups = [records[0:3], records[3:6], records[6:9], records[9:11]]
    assert edges.tolist() == [0, 15, 30, 45, 55]
    for column, group in enumerate(groups):
        for expert in range(4):
            count = sum(each.layers[0].counts_E[expert] for each in group)
            load = count / (100 * len(group) / 4)
            assert load_ES[expert, column] == pytest.approx(load, rel=1e-14)


def test_a_layer_counts_where_it_has_load() -> None:
    records = [
        record(layer([3, 1], 1), step=10),
        record(layer([3, 1], 1), layer([4, 0], 2), step=20),
        record(layer([0, 0], 1), layer([0, 0], 2), step=30),
    ]
    cv_LS = charts.cv_by_step(records)
    nan = math.nan
    np.testing.assert_array_equal(cv_LS, [[0.5, 0.5, nan], [nan, 1.0, nan]])
    np.testing.assert_array_equal(charts.mean_over_rows(cv_LS), [0.5, 0.75, nan])


def test_a_dashed_line_is_where_the_balance_changed() -> None:
    settings = [{}, {}, {"balance.aux_loss": 0.01}, {"balance.aux_loss": 0.01}]
    records = [replace(each, settings=s) for each, s in zip(run(steps=40), settings, strict=True)]
    for figure in (over_steps(records), cv(records)):
        for axes in figure.axes[:1]:
            marks = [line for line in axes.lines if line.is_dashed()]
            assert [list(line.get_xdata()) for line in marks] == [[20, 20]]
    assert not over_steps(records[2:]).axes[0].lines


def test_one_record_is_not_drawn_against_itself() -> None:
    """The second part has a bar with the colours of the steps."""
    last_step = (68, 1, 84)  # where viridis ends
    one, two = (png(loss(run(steps=steps))) for steps in (10, 20))
    assert area(one, last_step) == 0
    assert area(two, last_step) > 10


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize(("look", "paper"), [(LIGHT, "#fff"), (DARK, "#15171b")])
def test_colours_stand_out_from_the_page(look: Look, paper: str) -> None:
    """WCAG 2 asks for 4.5 to 1 of words, and for 3 to 1 of lines. Axes are in their line's colour.

    The lightest of an order is a neighbour of others, and is let be a little fainter.
    """
    assert f"--paper: {paper};" in _STYLE

    def contrast(colour: str) -> float:
        low, high = sorted((luminance(colour), luminance(paper)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(look.ink) > 4.5
    assert min(contrast(look.loss), contrast(look.cv)) > 3
    assert min(contrast(to_hex(look.order(place))) for place in (0.0, 0.5, 1.0)) > 1.5


def test_the_same_records_make_the_same_svg_in_the_colours_of_the_page() -> None:
    records = run(layers=2, steps=40)

    def drawn_in(look: Look) -> bytes:
        with look.applied():
            return svg(cv(records, look))

    light, dark, again = map(drawn_in, (LIGHT, DARK, DARK))
    assert dark == again
    assert DARK.ink.encode() in dark
    assert DARK.ink.encode() not in light
    for picture in (light, dark):
        assert b"<text" not in picture  # words are shapes: they need no font
        assert b"#ffffff" not in picture  # no paper of its own


def every_picture(records) -> list[Figure | None]:
    return [
        charts.load_heat_map(records[-1]),
        over_steps(records),
        cv(records),
        loss(records),
        charts.balance_losses(records),
    ]


no_losses = {"losses": {}, "scaled_losses": {}}
odd_runs = {
    "one record": [record(layer([3, 1]))],
    "one expert": [at(record(layer([5])), step) for step in (10, 20)],
    "layers of different size": [record(layer([3, 1], 1), layer([1, 2, 3], 4))],
    "a layer without tokens": [record(layer([0, 0], 1), layer([1, 2], 2))],
    "no tokens at all": [record(layer([0, 0]))],
    "a layer that comes later": [
        record(layer([1, 2], 1), step=10),
        record(layer([1, 2], 1), layer([4, 1], 2), step=20),
    ],
    "a model with other experts": [at(record(layer([1, 2])), 10), at(record(layer([1, 2, 3])), 20)],
    "steps that are not even": [at(record(layer([1, 2])), step) for step in (10, 11, 500)],
    "a loss that is lost": [
        at(record(layer([1, 2], losses={"z_loss": value}), loss=value), step)
        for step, value in ((10, 1.0), (20, math.nan), (30, math.inf))
    ],
    "a name that looks like a formula": [record(layer([1, 2], losses={"$\\frac$": 1.0}))],
    "thirteen layers": [record(*(layer([1, 2], number) for number in range(13)))],
}


@pytest.mark.parametrize("name", odd_runs)
@pytest.mark.filterwarnings("error")
def test_every_run_can_be_drawn(name: str) -> None:
    for figure in every_picture(odd_runs[name]):
        assert figure is not None
        assert imread(io.BytesIO(png(figure))).std() > 0


def test_what_the_records_lack_is_not_drawn() -> None:
    without = [replace(each, loss=None) for each in odd_runs["one record"]]
    assert loss(without) is None
    assert charts.balance_losses([record(layer([1, 2], **no_losses))]) is None


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (6, 8), (60, 256), (61, 5000)])
def test_pictures_fit_a_screen(layers: int, experts: int) -> None:
    (one,) = run(layers, experts, steps=10)
    height, width, _ = imread(io.BytesIO(png(charts.load_heat_map(one)))).shape
    assert 200 < width <= 3200
    assert 100 < height <= 1500
