"""Pictures and a page of a whole run, from its ``telemetry.jsonl``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ezpz_moe.errors import EzpzError
from ezpz_moe.telemetry import charts, look, page, panels, rank_charts
from ezpz_moe.telemetry.alerts import Alert
from ezpz_moe.telemetry.course import course
from ezpz_moe.telemetry.heat_map import Array
from ezpz_moe.telemetry.look import DARK, LIGHT, Look
from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.telemetry.where import find_records

FOLDER = "telemetry"
PAGE = "telemetry.html"


@dataclass(frozen=True)
class Plotted:
    """The written files, with the page last; the last record; every alert of the run."""

    paths: list[Path]
    last: StepRecord
    alerts: list[Alert]


def plot(run: Path, out: Path | None = None) -> Plotted:
    """Draw the run in the folder ``run`` (or from that file) into ``out``.

    Without ``out``, draws into the folder ``telemetry`` next to the records. Files of an earlier
    call are replaced once everything has been drawn.

    Raises:
        EzpzError: there are no records, they cannot be read, or ``out`` cannot be written.
    """
    source = find_records(run)
    found = course(source)
    if not found.records:
        raise EzpzError(
            f"{source}: holds no records yet: the run stopped or is still before its first one, "
            "which comes after as many steps as [telemetry] every in its flavor says, or between "
            "two logs."
        )
    pictures = _draw(found.records)
    files = {f"{picture.name}.png": picture.png for picture in pictures}
    files[PAGE] = page.page(source, found, pictures).encode()
    return Plotted(_write(files, out or source.parent / FOLDER), found.records[-1], found.alerts)


def _draw(records: Sequence[StepRecord]) -> list[page.Picture | panels.Panels]:
    """Draw every picture that the records have figures for, on white and for a dark page."""
    cv_LS, loads = charts.cv_by_step(records), charts.loads_by_step(records)
    with LIGHT.applied():
        light = {
            name: (look.png(figure), look.svg(figure), figure.get_figwidth())
            for name, figure in _figures(records, cv_LS, LIGHT).items()
        }
        over_steps = panels.panels_of(
            records, loads, look.png(charts.load_over_steps(records, loads))
        )
    with DARK.applied():
        dark = {name: look.svg(figure) for name, figure in _figures(records, cv_LS, DARK).items()}
    load_last, *others = [
        page.Picture(name, png, svg, dark[name], inches_wide)
        for name, (png, svg, inches_wide) in light.items()
    ]
    return [load_last, over_steps, *others]


def _figures(records: Sequence[StepRecord], cv_LS: Array, of: Look) -> dict[str, Figure]:
    """Return the figures that are drawn in the ink of a page."""
    figures = {
        "load_last": charts.load_heat_map(records[-1]),
        "cv_over_steps": charts.cv_over_steps(records, cv_LS, of),
        "loss_and_balance": charts.loss_and_balance(records, cv_LS, of),
        "balance_losses": charts.balance_losses(records, of),
        "ranks_over_steps": rank_charts.ranks_over_steps(records, of),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _write(files: dict[str, bytes], out: Path) -> list[Path]:
    """Move the files into place once all are on the disk, the page last."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Inside `out`, because os.replace moves files only within one file system.
        with tempfile.TemporaryDirectory(prefix=".ezpz-moe-", dir=out) as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            # dict order: the page comes last, so a reader who sees it finds its pictures.
            for name in files:
                os.replace(Path(folder, name), out / name)
    except OSError as error:
        raise EzpzError(f"{out}: cannot be written: {error}. Choose another with --out.") from error
    return [out / name for name in files]
