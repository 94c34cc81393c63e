"""How pictures look on white paper and on a dark page, and the bytes that are made of them.

Import this only to draw: matplotlib is slow to import.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

DPI = 100
"""Pixels per inch of a PNG."""

_CELLS_DPI = 140  # of the cells of a heat map in an SVG, which are pixels there too

# matplotlib writes a millionth of a point, which makes a line's path twice as long.
_PATH, _DIGITS = re.compile(rb' (?:d|x|y)="[^"]*"'), re.compile(rb"(\.\d\d)\d+")


def part_of(name: str, first: float, last: float) -> LinearSegmentedColormap:
    """Return a part of matplotlib's colour map: from 0, its beginning, to 1, its end."""
    return LinearSegmentedColormap.from_list(name, colormaps[name](np.linspace(first, last, 256)))


@dataclass(frozen=True)
class Look:
    """The colours of everything but expert load, which has the same ones everywhere.

    Attributes:
        ink: of words, axes and what has to be seen first.
        order: of layers and steps, from the first to the last.
        loss: of the training loss.
        cv: of the load's variation.
    """

    ink: str
    order: Colormap
    loss: str
    cv: str

    def applied(self) -> AbstractContextManager[None]:
        """In this context figures are made and saved in the ink of this look."""
        return matplotlib.rc_context(
            {
                "text.color": self.ink,
                "axes.labelcolor": self.ink,
                "axes.edgecolor": self.ink,
                "xtick.color": self.ink,
                "ytick.color": self.ink,
                # The names inside an SVG, and so its bytes, are the same every time.
                "svg.hashsalt": "ezpz_moe",
            }
        )


# Of viridis the part that is not faint on the page: without yellow on white, without dark violet
# on black. Loss and variation are blue and vermilion of Okabe and Ito's palette, and its lighter
# pair.
LIGHT = Look("black", part_of("viridis_r", 0.1, 1.0), loss="#0072B2", cv="#D55E00")
DARK = Look("#d8dce2", part_of("viridis", 0.3, 1.0), loss="#56B4E9", cv="#E69F00")


def png(figure: Figure) -> bytes:
    """Return the figure as PNG, on white. Its layout is settled with that."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    figure.set_layout_engine("none")  # an SVG of it has the same, and does not wait for it again
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """Return the figure as SVG, on whatever lies below it. It needs no fonts."""
    buffer = io.BytesIO()
    # Without the date: the same records make the same file.
    figure.savefig(buffer, format="svg", dpi=_CELLS_DPI, transparent=True, metadata={"Date": None})
    return _PATH.sub(lambda path: _DIGITS.sub(rb"\1", path[0]), buffer.getvalue())
