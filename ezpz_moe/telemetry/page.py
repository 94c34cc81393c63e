"""One self-contained HTML page of a run: no scripts, no network, pictures included."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ezpz_moe.telemetry.alert_groups import Group, grouped
from ezpz_moe.telemetry.alerts import Alert
from ezpz_moe.telemetry.course import Course
from ezpz_moe.telemetry.panels import Panels, load_colours
from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.telemetry.summary import (
    NOTHING,
    dates,
    first_step,
    headline,
    layer_rows,
    over_layers_rows,
    over_the_run,
    pair_rows,
    routing,
    steps,
)

_CAPTIONS = {
    "load_last": (
        "Load at the end",
        "Assignments of each expert over its layer's mean, in the last record. White is even, red "
        "is more, blue is less, black is a dead expert.",
    ),
    "load_over_steps": (
        "Load over the steps",
        "The same for every layer. A line that stays red or blue is an expert that stays in or out "
        "of favour. A dashed line is where a resumed run changed [router] or [balance].",
    ),
    "cv_over_steps": (
        "Imbalance over the steps",
        "Coefficient of variation of the load: standard deviation over mean. 0 is even, "
        "sqrt(E - 1) is one expert alone.",
    ),
    "loss_and_balance": (
        "Loss against balance",
        "Whether balance costs loss: a falling CV with a rising loss says so. On the right, each "
        "record is a point.",
    ),
    "balance_losses": (
        "Balance losses",
        "Without their coefficients, averaged over the layers.",
    ),
    "ranks_over_steps": (
        "Load of the ranks",
        "Under expert parallelism all wait for the busiest rank: its assignments over the mean of "
        "the ranks. Below, the share of the rows that leave their rank and their node.",
    ),
}

_STYLE = """
:root { color-scheme: light dark;
        --paper: #fff; --ink: #1a1a1a; --quiet: #555; --line: #ddd; --alert: #d55e00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15171b; --ink: #d8dce2; --quiet: #9aa1ab; --line: #343942; --alert: #ff8c42; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       margin: 1.5rem clamp(1rem, 2vw, 3rem) 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.5rem; }
p, li, figcaption { max-width: 48rem; overflow-wrap: anywhere; }
.quiet, figcaption, dt { color: var(--quiet); }
figcaption { margin-bottom: 0.6rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr));
         gap: 0.8rem 2rem; margin: 0; padding: 0.8rem 0;
         border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
dt { font-size: 0.85rem; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
/* Each section has at least the width that it was drawn for: as many side by side as have room. */
main { display: flex; flex-wrap: wrap; gap: 0 3rem; }
section { flex: 1 1 min(100%, var(--drawn, 100%)); min-width: 0; }
/* Scrolls where words would be too small to read: they are 10 pt at the width that was drawn. */
.wide { overflow-x: auto; }
.wide img { display: block; height: auto; width: 100%;
            min-width: calc(0.75 * var(--drawn)); max-width: calc(1.3 * var(--drawn)); }
/* Panels are as large as their pixels, or larger: their words are the page's. */
.panels { display: grid; gap: 1.2rem 2rem;
          grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
h3 { font-size: 0.9rem; font-weight: 600; margin: 0 0 0.2rem; }
.cells { position: relative; border: 1px solid var(--line); }
.cells img { display: block; width: 100%; max-height: 20rem; }
.cells i { position: absolute; top: 0; bottom: 0; border-left: 1.5px dashed #000; }
.ends { display: flex; justify-content: space-between; margin: 0; font-size: 0.85rem;
        max-width: none; color: var(--quiet); }
.legend { max-width: 24rem; margin-bottom: 1rem; }
.legend div { height: 0.8rem; border: 1px solid var(--line); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; min-width: 2.8rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0;
                                 position: sticky; left: 0; background: var(--paper); }
.alerts { border-left: 4px solid var(--alert); padding-left: 2rem;
          columns: 30rem; column-gap: 3.5rem; }
.alerts li { margin-bottom: 0.4rem; break-inside: avoid; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture by its name, which is the file's name without its ending.

    Attributes:
        name: what it shows; one of the captions'.
        png: what is written as a file.
        light: the same as SVG, for a page that is light.
        dark: and for one that is dark.
        inches_wide: how wide it was drawn.
    """

    name: str
    png: bytes
    light: bytes
    dark: bytes
    inches_wide: float


def page(
    source: Path,
    course: Course,
    pictures: Sequence[Picture | Panels],
) -> str:
    """Return the page of a run, whose course is from the file ``source``."""
    last = course.records[-1]
    figures = (
        f"<p>{escape(headline(last))}.</p>\n{_table(over_layers_rows(last), 'Over the layers')}"
    )
    title = escape(f"Expert load of {source.parent.resolve().name or source}")
    body = [
        f"<header>\n<h1>{title}</h1>\n{_facts(source, course)}\n</header>\n<main>",
        # Alerts come first: they are what the reader opens the page for.
        _section("Alerts" if course.alerts else "No alerts", _alerts(course.alerts, last)),
        _section("Over the layers", figures, wide="26rem"),
        *(_panels(each) if isinstance(each, Panels) else _figure(each) for each in pictures),
        _section(f"Layer by layer, {steps(last)}", _table(layer_rows(last), "Layer by layer")),
        *_together(last),
        "</main>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _together(last: StepRecord) -> list[str]:
    """Return the section about pairs, if they are recorded."""
    rows = pair_rows(last)
    return [_section("Chosen together", _table(rows, "Chosen together"))] if rows else []


def _section(title: str, content: str, wide: str = "") -> str:
    """Return a section, which other sections may be beside if it is ``wide`` and no more."""
    style = f' style="--drawn: {wide}"' if wide else ""
    return f"<section{style}>\n<h2>{title}</h2>\n{content}\n</section>"


def _facts(source: Path, course: Course) -> str:
    """Return what the run is: the page may be read far from it."""
    records = course.records
    facts = {
        "Model": over_the_run(records, lambda record: record.model),
        "Job": over_the_run(records, lambda record: record.job),
        "Trained": dates(records),
        "Steps": _steps(course),
        "Routing and balance": over_the_run(records, routing),
        "Records": str(source),
    }
    # Records of before there were these facts lack them.
    told = "\n".join(
        f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items() if fact
    )
    return f'<dl class="facts">\n{told}\n</dl>'


def _steps(course: Course) -> str:
    number = f"{course.number} record{'s' * (course.number > 1)}"
    return f"{first_step(course.records[0])} to {course.records[-1].step}, in {number}"


def _alerts(alerts: Sequence[Alert], last: StepRecord) -> str:
    thresholds, warmup = last.thresholds, last.warmup_steps
    said = (
        f"With the run's own alert_dead_steps = {thresholds.alert_dead_steps}, alert_cv_rise = "
        f"{thresholds.alert_cv_rise:g} and alert_collapse = {thresholds.alert_collapse:g}"
        f"{f', after the {warmup} steps of the warm-up' if warmup else ''}."
    )
    items = "\n".join(f"<li>{_group(each)}</li>" for each in grouped(alerts))
    listed = f'<ul class="alerts">\n{items}\n</ul>\n' if alerts else ""
    return f'{listed}<p class="quiet">{said}</p>'


def _group(group: Group) -> str:
    """Return a kind of alert: of several, each is behind a line that opens it."""
    if len(group.alerts) == 1:
        return escape(str(group.alerts[0]))
    each = "\n".join(f"<li>{escape(alert.found)}</li>" for alert in group.alerts)
    return (
        f"{escape(group.headline)}. Remedy: {escape(group.remedy)}.\n"
        f"<details><summary>Each of them</summary>\n<ul>\n{each}\n</ul></details>"
    )


def _figure(picture: Picture) -> str:
    title, caption = _CAPTIONS[picture.name]
    figure = (
        f"<figure>\n<figcaption>{caption}</figcaption>\n"
        f"{_scrolling(title)}<picture>\n"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_embedded(picture.dark)}">\n'
        f'<img alt="{title}" src="{_embedded(picture.light)}">\n</picture></div>\n</figure>'
    )
    return _section(title, figure, wide=f"{picture.inches_wide:g}in")


def _panels(of: Panels) -> str:
    title, caption = _CAPTIONS[of.name]
    marks = "".join(f'<i style="left: {100 * place:.2f}%"></i>' for place in of.changes)
    shown = "\n".join(
        f"<div><h3>layer {panel.layer}, {panel.experts} expert{'s' * (panel.experts > 1)}</h3>\n"
        f'<div class="cells"><img alt="{title}, layer {panel.layer}" '
        f'style="height: {panel.high}px" src="{_embedded(panel.png, "png")}">{marks}</div>\n'
        f'<p class="ends"><span>step {of.first}</span><span>{of.last}</span></p></div>'
        for panel in of.panels
    )
    return _section(
        title,
        f"<figure>\n<figcaption>{caption} Experts count upwards from 0.</figcaption>\n{_legend()}\n"
        f'<div class="panels">\n{shown}\n</div>\n</figure>',
    )


def _legend() -> str:
    colours, loads = ", ".join(load_colours()), "".join(f"<span>{x}</span>" for x in "¼½124")
    return (
        f'<div class="legend"><div style="background: linear-gradient(to right, {colours})"></div>'
        f'<p class="ends">{loads}</p></div>'
    )


def _embedded(picture: bytes, kind: str = "svg+xml") -> str:
    # Embedded, because the page is mailed and archived without its folder.
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _scrolling(name: str) -> str:
    """Begin what scrolls sideways if there is no room, also by the keyboard."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{name}">'


def _table(rows: Sequence[dict[str, str]], name: str) -> str:
    if not rows:
        return f'<p class="quiet">{NOTHING}</p>'
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in rows[0])
    lines = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows
    )
    return (
        f"{_scrolling(name)}<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n"
        "</tbody>\n</table></div>"
    )
