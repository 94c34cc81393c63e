"""One self-contained HTML page of a run: no scripts, no network, pictures included."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ezpz_moe.telemetry.record import StepRecord
from ezpz_moe.telemetry.summary import headline, layer_rows, over_layers_rows, steps

_CAPTIONS = {
    "load_last": (
        "Load at the end",
        "Assignments of each expert over its layer's mean, in the last record. White is even, red "
        "is more, blue is less, black is a dead expert.",
    ),
    "load_over_steps": (
        "Load over the steps",
        "The same for every layer. A line that stays red or blue is an expert that stays in or out "
        "of favour.",
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
}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 0.5rem; }
p, li, figcaption { max-width: 48rem; } .quiet, figcaption { color: #555; }
figcaption { margin-bottom: 0.6rem; }
code { overflow-wrap: anywhere; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { font-weight: 600; vertical-align: bottom; min-width: 3.5rem; }
th:first-child, td:first-child { text-align: left; }
.alerts li { margin: 0.4rem 0; } .alerts { border-left: 4px solid #d55e00; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG and its name, which is the file's name without ``.png``."""

    name: str
    png: bytes


def page(
    source: Path,
    records: Sequence[StepRecord],
    pictures: Sequence[Picture],
    alerts: Sequence[str],
) -> str:
    """Return the page of a run, from the records in the file ``source``."""
    last = records[-1]
    title = escape(f"Expert load of {source.parent.resolve().name or source}")
    body = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">{escape(_what(records))} <code>{escape(str(source))}</code></p>',
        # Alerts come first: they are what the reader opens the page for.
        f"<h2>{'Alerts' if alerts else 'No alerts'}</h2>",
        _alerts(alerts, last),
        "<h2>Over the layers</h2>",
        f"<p>{escape(headline(last))}.</p>",
        _table(over_layers_rows(last)),
        *map(_figure, pictures),
        f"<h2>Layer by layer, {steps(last)}</h2>",
        _table(layer_rows(last)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _what(records: Sequence[StepRecord]) -> str:
    first = records[0].step - records[0].steps + 1
    number = f"{len(records)} record{'s' * (len(records) > 1)}"
    return f"{number} of steps {first} to {records[-1].step}, from"


def _alerts(alerts: Sequence[str], last: StepRecord) -> str:
    thresholds, warmup = last.thresholds, last.warmup_steps
    said = (
        f"With the run's own alert_dead_steps = {thresholds.alert_dead_steps}, alert_cv_rise = "
        f"{thresholds.alert_cv_rise:g} and alert_collapse = {thresholds.alert_collapse:g}"
        f"{f', after the {warmup} steps of the warm-up' if warmup else ''}."
    )
    items = "\n".join(f"<li>{escape(alert)}</li>" for alert in alerts)
    listed = f'<ul class="alerts">\n{items}\n</ul>\n' if alerts else ""
    return f'{listed}<p class="quiet">{said}</p>'


def _figure(picture: Picture) -> str:
    title, caption = _CAPTIONS[picture.name]
    # Embedded, because the page is mailed and archived without its folder.
    data = base64.b64encode(picture.png).decode()
    return (
        f"<h2>{title}</h2>\n<figure>\n<figcaption>{caption}</figcaption>\n"
        f'<img alt="{title}" src="data:image/png;base64,{data}">\n</figure>'
    )


def _table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return '<p class="quiet">None: no layer was given a token.</p>'
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in rows[0])
    lines = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n'
        "</tbody>\n</table></div>"
    )
