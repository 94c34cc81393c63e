"""Tables that fit a terminal: the layout of rows of words in so many columns.

A row of figures is of use only if they are whole. So a table that is too wide wraps its headings
and its sentences at spaces, then leaves out columns, the least important first, and at last
becomes a block of lines for each row. No figure is ever broken, and no name.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from rich import box
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from ezpz_moe.telemetry.text import has_figures

Row = Mapping[str, str]

_wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)

_GAP = 2  # between columns
_INDENT = 2  # of what stands below a block's name
_SENTENCE = 24  # Longer cells with spaces are sentences, which wrap, but into no narrower column.
_LONGEST_NAME = 40  # Longer words are paths and values of many parts: only they may break.
_LEAST = 3  # With fewer columns, blocks say more.


def fit(rows: Sequence[Row], width: int, important: Sequence[str] = ()) -> dict[str, int] | None:
    """Return the columns to show, in their order, and the width of each; None if too few fit.

    Args:
        rows: at least one; all have the same keys, the headings.
        width: of the terminal, in characters.
        important: headings from the most to the least important. The first column always comes
            before them, and columns that are not named come after them, in the table's order.
    """
    shown = list(rows[0])
    ranked = list(dict.fromkeys([shown[0], *(each for each in important if each in shown), *shown]))
    least = min(_LEAST, len(shown))
    while (widths := _widths(rows, shown, width)) is None and len(shown) > least:
        shown.remove(ranked.pop())
    return widths


def _widths(rows: Sequence[Row], headings: Sequence[str], width: int) -> dict[str, int] | None:
    """Return a width for each of these columns, or None if they do not fit together."""
    room = width - _GAP * (len(headings) - 1)
    whole = {each: max(cell_len(each), *(cell_len(row[each]) for row in rows)) for each in headings}
    if sum(whole.values()) <= room:
        return whole
    widths = {each: _narrowest(rows, each) for each in headings}
    spare = room - sum(widths.values())
    if spare < 0:
        return None
    # Those that need the least first: what they leave goes to the others.
    needy = sorted(headings, key=lambda each: whole[each] - widths[each])
    for left, each in zip(range(len(needy), 0, -1), needy, strict=True):
        more = min(spare // left, whole[each] - widths[each])
        widths[each] += more
        spare -= more
    return widths


def _has_sentences(rows: Sequence[Row], heading: str) -> bool:
    if has_figures(rows, heading) or heading == next(iter(rows[0])):
        return False
    return any(
        cell_len(cell) > (_SENTENCE if " " in cell else _LONGEST_NAME)
        for cell in (row[heading] for row in rows)
    )


def _narrowest(rows: Sequence[Row], heading: str) -> int:
    """Return the width in which no word of the heading breaks, and no cell, or no name in one."""
    cells = [row[heading] for row in rows]
    whole = [cell_len(cell) for cell in cells]
    if _has_sentences(rows, heading):
        names = [length for length in _word_lengths(*cells) if length <= _LONGEST_NAME]
        # A sentence in a column as wide as its longest word would be a pillar.
        whole = [min(_SENTENCE, max(whole)), *names]
    return max(0, *_word_lengths(heading.replace("_", " ")), *whole)


def _word_lengths(*texts: str) -> list[int]:
    return [cell_len(word) for each in texts for word in each.split()]


def fitted(rows: Sequence[Row], widths: Mapping[str, int]) -> Table:
    """Return a table of these columns of the rows."""
    # Two spaces between columns: one of padding, one in place of a line.
    made = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), show_header=True
    )
    for heading, width in widths.items():
        lines = _wrap(heading.replace("_", " "), width)
        made.add_column(
            escape("\n".join(lines)),
            header_style="bold",
            justify="right" if has_figures(rows, heading) else "left",
            width=width,
            vertical="top",
            # A word longer than its column is folded: rich's own default cuts it off.
            overflow="fold",
        )
    for row in rows:
        # Escaped: rich would take [router] in a cell for a style, and leave it out.
        made.add_row(*(escape(row[heading]) for heading in widths))
    return made


def blocks(rows: Sequence[Row], width: int) -> Iterator[str]:
    """Yield the lines of a block for each row: its name, and below it a line per column."""
    name, *headings = rows[0]
    longest = max((cell_len(each) for each in headings), default=0)
    for row in rows:
        yield row[name]
        for heading in headings:
            yield from _entry(heading.replace("_", " "), row[heading], longest, width)


def wrapped(line: str, width: int) -> list[str]:
    """Return a line of prose in lines of this width; what stands in `backticks` stays whole."""
    if len(line) <= width:
        return [line]
    below = " " * (len(line) - len(line.lstrip()) + _INDENT)
    whole = re.sub("`[^`]*`", lambda quoted: quoted[0].replace(" ", "\0"), line)
    return [each.replace("\0", " ") for each in _wrap(whole, width, subsequent_indent=below)]


def _entry(key: str, cell: str, longest: int, width: int) -> Iterator[str]:
    label = f"{' ' * _INDENT}{key:{longest + _GAP}}"
    below = " " * len(label)
    if max(_word_lengths(cell), default=0) > width - len(label):
        yield label.rstrip()
        label = below = " " * (2 * _INDENT)
    yield from _wrap(cell, width, initial_indent=label, subsequent_indent=below)
