"""Tables of numbers as coloured cells: all our pictures draw them this way.

Import this only to draw: matplotlib is slow to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_rgba
from matplotlib.image import AxesImage

Array = npt.NDArray[np.float64]

_COLOURS = 32  # of an indexed picture, beside zero and absent: steps that no eye sees

ABSENT = "0.85"
"""The grey of a cell without a value."""


@dataclass(frozen=True)
class Palette:
    """The colours of values.

    Attributes:
        colours: from the least to the most.
        scale: value -> place among them.
        zero: the colour of exactly 0; None if it is not told apart from small values.
    """

    colours: Colormap
    scale: Normalize
    zero: str | None = None

    def rgba(self, values: Array) -> Array:
        """Return the colour of each value, from 0 to 1, grey for NaN: [..., 4]."""
        # Any number in place of NaN: its colour is replaced, and a scale may not take NaN.
        colours: Array = self.colours(self.scale(np.nan_to_num(values, nan=1.0)))
        if self.zero is not None:
            colours[values == 0] = to_rgba(self.zero)
        colours[np.isnan(values)] = to_rgba(ABSENT)
        return colours

    def indexed(self, values: Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Return each value's place in a small palette, and that palette: [colours, RGB].

        Few colours make a small file: neighbours in a picture are then mostly alike.
        """
        places = np.linspace(0.0, 1.0, _COLOURS)
        palette = np.vstack([self.colours(places), to_rgba(self.zero or "black"), to_rgba(ABSENT)])
        place = np.clip(np.ma.filled(self.scale(np.nan_to_num(values, nan=1.0)), 0.0), 0.0, 1.0)
        index = np.rint(place * (_COLOURS - 1)).astype(np.uint8)
        if self.zero is not None:
            index[values == 0] = _COLOURS
        index[np.isnan(values)] = _COLOURS + 1
        return index, (255 * palette[:, :3]).round().astype(np.uint8)

    @property
    def bar(self) -> ScalarMappable:
        """What a figure's colour bar is made from."""
        return ScalarMappable(self.scale, self.colours)


def filled(rows: Sequence[Sequence[float | None]]) -> Array:
    """Return rows of different lengths as one table: NaN after a row's end, and for None."""
    table = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        table[number, : len(row)] = [np.nan if value is None else value for value in row]
    return table


def draw_cells(
    axes: Axes,
    values: Array,
    palette: Palette,
    x_edges: npt.ArrayLike | None = None,
    *,
    first_on_top: bool = True,
) -> None:
    """Draw a cell for each value, with a row's number as its place on the y axis.

    Args:
        axes: where to draw.
        values: [rows, columns]; NaN where there is none.
        palette: their colours.
        x_edges: the columns' edges, one more than there are columns; by default each cell is
            centred on its number.
        first_on_top: whether rows go downwards.
    """
    rows, columns = values.shape
    x_edges = np.arange(columns + 1) - 0.5 if x_edges is None else x_edges
    # Colours are computed here, not by the axes: a logarithmic scale would mask 0 like NaN, and a
    # dead expert must not look absent.
    cells = axes.pcolorfast(x_edges, np.arange(rows + 1) - 0.5, palette.rgba(values))
    if isinstance(cells, AxesImage):  # it is where the columns are evenly apart
        cells.set_interpolation("none")  # an SVG then has a pixel for a cell, whatever its size
    if first_on_top:
        axes.invert_yaxis()
    axes.tick_params(length=2)
