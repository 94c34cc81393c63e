"""``ezpz-moe plot``: the files, the page, and what it refuses."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from telemetry_cases import at, layer, record, run

from ezpz_moe import cli
from ezpz_moe.config.telemetry_schema import AlertThresholds
from ezpz_moe.telemetry import page
from ezpz_moe.telemetry.charts import loads_by_step
from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.telemetry.look import DARK
from ezpz_moe.telemetry.panels import panels_of
from ezpz_moe.telemetry.plot import plot
from ezpz_moe.telemetry.summary import NOTHING

PICTURES = ["load_last", "load_over_steps", "cv_over_steps", "loss_and_balance", "balance_losses"]
XLINK = "{http://www.w3.org/1999/xlink}"
FILES = [*(f"{name}.png" for name in PICTURES), "telemetry.html"]


def written(folder: Path, records) -> Path:
    for each in records:
        append(folder / "telemetry.jsonl", each)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A short run, in whose last layer an expert dies."""
    return written(tmp_path / "run", run(layers=2, experts=4, steps=220, every=20, dead=1))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return written(tmp_path / "tiny", [record(layer([3, 1]))])


class Page(HTMLParser):
    """What a browser would load, show and run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert not self.open  # every tag is closed

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plot", *map(str, arguments)])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("ezpz-moe: error: ")


def test_the_command_writes_and_tells(run_dir: Path, capsys) -> None:
    assert cli.main(["plot", str(run_dir)]) == 0
    out = run_dir / "telemetry"
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("steps 201 to 220: 2 MoE layers of 4 experts, computed by for_loop")
    assert lines[-6:] == [f"{out / name} written" for name in FILES]
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert rows["min / mean"][-2:] == ["0", "2"]  # the dead expert, in layer 2
    assert rows["dead experts (sum)"][-3:] == ["1", "1", "2"]
    (alert,) = [line for line in lines if "got no token" in line]
    assert alert.startswith("ALERT step 200, layer 2: expert 3 of 4 got no tokens for 100 steps")


def test_the_page_needs_nothing_else(run_dir: Path) -> None:
    plotted = plot(run_dir)
    shown = Page(plotted.paths[-1].read_text())
    assert not shown.tags & {"script", "link", "iframe", "object"}
    starts = ("data:image/svg+xml;base64,", "data:image/png;base64,")
    assert all(link.startswith(starts) for link in shown.links)
    svgs, cells = (
        [base64.b64decode(link.removeprefix(start)) for link in shown.links if start in link]
        for start in starts
    )
    dark, light = svgs[::2], svgs[1::2]
    assert len(dark) == len(light) == len(PICTURES) - 1
    assert len(cells) == 2  # a panel for each layer, alike on both
    assert all(DARK.ink.encode() in picture for picture in dark)
    assert not any(DARK.ink.encode() in picture for picture in light)
    for picture in svgs:
        elements = list(ElementTree.fromstring(picture).iter())
        targets = [e.get(f"{XLINK}href") for e in elements if e.get(f"{XLINK}href")]
        assert all(target.startswith(("#", "data:image/png")) for target in targets)
        assert not any(element.tag.endswith(("}script", "}text")) for element in elements)
    assert "url(" not in plotted.paths[-1].read_text()
    assert "@import" not in plotted.paths[-1].read_text()


def test_the_page_has_the_figures_and_the_alerts(run_dir: Path) -> None:
    plotted = plot(run_dir)
    shown = Page(plotted.paths[-1].read_text())
    assert plotted.alerts
    assert all(alert.found in shown.text for alert in plotted.alerts)
    by_layer = shown.rows[[row[0] for row in shown.rows].index("layer") :]
    figures = [dict(zip(by_layer[0], row, strict=True)) for row in by_layer[1:]]
    assert [row["layer"] for row in figures] == ["1", "2"]
    assert [row["dead experts"] for row in figures] == ["0", "1"]
    assert float(figures[1]["max / mean"]) == pytest.approx(
        max(plotted.last.layers[1].counts_E) / sum(plotted.last.layers[1].counts_E) * 4, rel=5e-3
    )


def facts(text: str) -> dict[str, str]:
    """What the head of a page says of the run."""
    return dict(re.findall(r"<dt>(.*)</dt><dd>(.*)</dd>", text))


def test_the_head_says_what_ran_and_when(tmp_path: Path) -> None:
    """Resumed after midnight, with another job and a balance loss."""
    begin = datetime(2026, 11, 30, 23, 50, tzinfo=UTC)
    first, *later = [
        replace(each, time=begin + timedelta(seconds=each.step), model="mine", job="a.toml")
        for each in run(layers=1, steps=1200, every=300)
    ]
    aux = {"balance.aux_loss": 0.01, "router.routing": "topk"}
    later = [replace(each, job="b.toml", settings=aux) for each in later]
    folder = written(tmp_path / "run", [first, *later])
    assert facts(plot(folder).paths[-1].read_text()) == {
        "Model": "mine",
        "Job": "a.toml; from step 301 on b.toml",
        "Trained": "2026-11-30 23:55 to 2026-12-01 00:10 UTC",
        "Steps": "1 to 1200, in 4 records",
        "Routing and balance": "the defaults; from step 301 on balance.aux_loss = 0.01, "
        "router.routing = &quot;topk&quot;",
        "Records": str(folder / "telemetry.jsonl"),
    }


def test_a_run_of_one_day_names_it_once(tiny: Path) -> None:
    zone = timezone(timedelta(hours=2))
    times = [datetime(2026, 12, 1, hour, 30, tzinfo=zone) for hour in (9, 17)]
    for step, time in zip((20, 30), times, strict=True):
        append(tiny / "telemetry.jsonl", replace(at(record(layer([3, 1])), step), time=time))
    head = facts(plot(tiny).paths[-1].read_text())
    assert head["Trained"] == "2026-12-01 07:30 to 15:30 UTC"


def test_records_of_before_there_was_a_head_have_none_of_it(tiny: Path) -> None:
    assert facts(plot(tiny).paths[-1].read_text()).keys() == {
        "Steps",
        "Routing and balance",
        "Records",
    }


def test_the_alerts_are_those_of_the_runs_own_thresholds(tmp_path: Path) -> None:
    own = AlertThresholds(alert_dead_steps=40, alert_cv_rise=9.0, alert_collapse=0.01)
    records = run(layers=2, steps=220, every=20, dead=1)
    records = [replace(each, thresholds=own, warmup_steps=20) for each in records]
    plotted = plot(written(tmp_path / "run", records))
    (alert,) = plotted.alerts
    assert str(alert).startswith("step 140, layer 2: expert 7 of 8 got no tokens for 40 steps")
    said = (
        "alert_dead_steps = 40, alert_cv_rise = 9 and alert_collapse = 0.01, after the 20 steps of "
        "the warm-up."
    )
    assert said in Page(plotted.paths[-1].read_text()).text


def test_the_backend_that_computed_is_named_beside_the_one_asked_for(tmp_path: Path) -> None:
    chosen = record(layer([3, 1]), backend="auto", computed_by=("for_loop",))
    text = plot(written(tmp_path / "run", [chosen])).paths[-1].read_text()
    assert "computed by for_loop, chosen by auto, loss" in text


def test_no_alerts_are_said_to_be_none(tiny: Path) -> None:
    assert "<h2>No alerts</h2>" in plot(tiny).paths[-1].read_text()


def test_what_a_run_names_itself_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    losses = {"losses": {evil: 1.0}, "scaled_losses": {}}
    folder = written(
        tmp_path / "<b>run&amp;",
        [record(layer([3, 1], **losses), backend=evil)],
    )
    text = plot(folder).paths[-1].read_text()
    shown = Page(text)
    assert not shown.tags & {"script", "b"}
    assert f"computed by {evil}" in shown.text
    assert "Expert load of <b>run&amp;" in shown.text


def test_out_and_the_file_itself(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "plots"
    assert cli.main(["plot", str(tiny / "telemetry.jsonl"), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert [path.name for path in tiny.iterdir()] == ["telemetry.jsonl"]


def test_a_run_that_goes_on_is_drawn_again(tiny: Path) -> None:
    before = plot(tiny).paths[-1].read_text()
    append(tiny / "telemetry.jsonl", at(record(layer([4, 4])), 20))
    after = plot(tiny).paths[-1].read_text()
    assert "steps 1 to 10" in before
    assert "steps 11 to 20" in after
    assert sorted(path.name for path in (tiny / "telemetry").iterdir()) == sorted(FILES)


def test_a_run_without_losses_has_no_picture_of_them(tmp_path: Path) -> None:
    bare = record(layer([3, 1], losses={}, scaled_losses={}), loss=None)
    names = [path.name for path in plot(written(tmp_path / "bare", [bare])).paths]
    assert names == [*FILES[:3], FILES[-1]]


def test_a_run_whose_layers_got_nothing_has_a_page(tmp_path: Path, capsys) -> None:
    nothing = record(layer([0, 0], losses={}, scaled_losses={}))
    folder = written(tmp_path / "run", [nothing, at(nothing, 20)])
    assert cli.main(["plot", str(folder)]) == 0
    headline, said, *_ = capsys.readouterr().out.splitlines()
    assert "2 experts, computed by for_loop" in headline
    assert said == NOTHING
    page_of_it = (folder / "telemetry" / "telemetry.html").read_text()
    assert page_of_it.count(NOTHING) == 1
    assert "<td>1</td>" in page_of_it  # the layer by layer table names it


def test_numbers_that_no_axis_shows_leave_a_page(tmp_path: Path, recwarn) -> None:
    huge = {"losses": {"aux_loss": 1e308}, "scaled_losses": {"aux_loss": 1e308}}
    first = record(layer([3, 1], **huge), layer([3, 1], 2, **huge), loss=1e308)
    last = at(record(layer([3, 1], **huge), loss=-1e308), 20)
    text = plot(written(tmp_path / "run", [first, last])).paths[-1].read_text()
    assert "loss -1e+308" in text
    assert not [each for each in recwarn if issubclass(each.category, RuntimeWarning)]


LINE = '"step": 10'
DEEP = 10**5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (LINE, f'"step": {2**40 + 1}', "step: Input should be less than or equal to"),
        (LINE, f'"step": {"9" * 400}', "step: Input should be less than or equal to"),
        (LINE, f'"step": {"9" * 5000}', "is not JSON: number out of range"),
        ("[3, 1]", f"[{'9' * 400}, 1]", "layers.0.counts_E.0: Input should be less than"),
        ('"layer": 1', f'"layer": {"9" * 40}', "layers.0.layer: Input should be less than"),
        (LINE, f'"x": {"[" * DEEP}{"]" * DEEP}, {LINE}', "is not JSON: recursion limit exceeded"),
        ('"for_loop"', r'"\ud800"', "is not JSON: "),
    ],
)
def test_what_no_run_writes_is_one_line(tiny: Path, capsys, old: str, new: str, said: str) -> None:
    file = tiny / "telemetry.jsonl"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    message = refusal(capsys, tiny)
    assert message.startswith(f"{file}, line 1: {said}")
    assert message.endswith("Is it a telemetry.jsonl that ezpz_moe wrote?")


def test_nothing_is_written_when_drawing_fails(tiny: Path, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(page, "page", broken)
    with pytest.raises(RuntimeError):
        plot(tiny)
    assert [path.name for path in tiny.iterdir()] == ["telemetry.jsonl"]


def test_a_job_names_the_folder_of_its_run(tiny: Path, tmp_path, capsys) -> None:
    job = '[job]\ndump_folder = "{}"\n[model]\nname = "ezpz_moe"\nflavor = "debugmodel"\n'
    (tmp_path / "job.toml").write_text(job.format(tiny))
    assert cli.main(["plot", str(tmp_path / "job.toml")]) == 0
    assert str(tiny / "telemetry" / "telemetry.html") in capsys.readouterr().out
    (tmp_path / "job.toml").write_text(job.format(tmp_path / "none"))
    assert "none: there is no such folder" in refusal(capsys, tmp_path / "job.toml")


def test_no_picture_is_replaced_when_the_disk_is_full(tiny: Path, monkeypatch, capsys) -> None:
    plot(tiny)
    before = {path: path.read_bytes() for path in (tiny / "telemetry").iterdir()}
    append(tiny / "telemetry.jsonl", at(record(layer([4, 4])), 20))
    whole = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "telemetry.html":
            raise OSError(28, "No space left on device")
        return whole(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refusal(capsys, tiny)
    assert {path: path.read_bytes() for path in (tiny / "telemetry").iterdir()} == before


def test_what_is_no_run_is_refused(tmp_path: Path, capsys) -> None:
    missing = tmp_path / "typo"
    assert refusal(capsys, missing) == (
        f"{missing}: there is no such folder or file. Name a run's dump_folder."
    )
    without = tmp_path / "other"
    without.mkdir()
    assert refusal(capsys, without).startswith(f"{without}: holds no telemetry.jsonl. A run whose")
    foreign = tmp_path / "notes.txt"
    foreign.write_bytes(b"\xff\xfe notes\n")
    assert refusal(capsys, foreign).startswith(f"{foreign}, line 1: is not JSON")
    empty = tmp_path / "telemetry.jsonl"
    empty.touch()
    assert refusal(capsys, tmp_path).startswith(f"{empty}: holds no records yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "other",
        "telemetry.jsonl",
    ]


def test_the_folder_above_a_run_leads_to_it(tiny: Path, capsys) -> None:
    expected = f"There is one below it: {tiny / 'telemetry.jsonl'}."
    assert refusal(capsys, tiny.parent).endswith(expected)


def test_out_that_is_a_file_is_refused(tiny: Path, capsys) -> None:
    file = tiny / "telemetry.jsonl"
    message = refusal(capsys, tiny, "--out", file)
    assert message.startswith(f"{file}: cannot be written: ")
    assert message.endswith("Choose another with --out.")


def test_plotting_needs_neither_torch_nor_a_host(tiny: Path) -> None:
    program = (
        "import sys\nfrom ezpz_moe.cli import main\n"
        f"main(['plot', {str(tiny)!r}])\n"
        "print({'torch', 'torchtitan', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.splitlines()[-1] == "set()"


def test_the_page_of_a_deep_model_can_be_mailed(tmp_path: Path) -> None:
    """24 layers of 64 experts take 0.48 MB; with cells of a picture's size, for two looks, 1.2."""
    records = run(24, 64, steps=80, every=10, top_k=8)
    assert plot(written(tmp_path / "run", records)).paths[-1].stat().st_size < 700_000


def test_a_panel_shows_each_step_where_it_was() -> None:
    """Even load, a dead expert, a layer that comes later, and records of unlike length."""
    first = at(record(layer([4, 4]), steps=10), 10)
    last = at(record(layer([8, 0]), layer([1, 1], 2), steps=30), 40)
    records = [first, replace(last, settings={"balance.aux_loss": 0.01})]
    of_run = panels_of(records, loads_by_step(records), b"")
    assert (of_run.first, of_run.last, of_run.changes) == (1, 40, (0.25,))
    one, two = (imread(io.BytesIO(panel.png))[..., :3] for panel in of_run.panels)
    wide, half = one.shape[1], one.shape[0] // 2
    upper, lower = one[:half], one[half:]  # experts count upwards
    assert (one[:, : wide // 4] > 0.9).all()
    assert (upper[:, wide // 4 :] == 0).all()
    assert lower[0, -1, 0] > lower[0, -1, 2]  # red: twice the mean
    assert np.allclose(two[:, : wide // 4], 0.85, atol=0.01)
    assert (two[:, wide // 4 :] > 0.9).all()
