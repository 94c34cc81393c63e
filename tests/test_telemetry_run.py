"""Telemetry of a real run: its file, wandb offline, TensorBoard, and what stops a run."""

import json
import math
import re
import shutil
import struct
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from dialect import ON_0_2, job, precision
from trainer_runs import EP_2, LOG, assert_same_bits, job_folder, train

from ezpz_moe.config.telemetry_schema import AlertThresholds
from ezpz_moe.telemetry.course import course
from ezpz_moe.telemetry.json_lines import read

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(ON_0_2, reason="[telemetry] needs torchtitan 0.3 or later"),
]

FLAVOR = """
inherits = "tiny"
[balance]
aux_loss = 0.01
[telemetry]
every = 2
detail = "per_expert"
"""
DUMP = 'dump = { every = 2, what = ["ids", "probabilities"] }\n'
VALIDATION = """
[validation]
enable = true
dataset = "pydoc_topics"
freq = 2
steps = 3
"""
TENSORBOARD = "--metrics.enable-tensorboard"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of jobs with and without validation and dumps, and of their runs."""
    folder = job_folder(tmp_path_factory.mktemp("telemetry"))
    (folder / "plain.toml").write_text(FLAVOR)
    (folder / "watched.toml").write_text(FLAVOR + DUMP)
    text = (folder / "job.toml").read_text()
    (folder / "plain_job.toml").write_text(text.replace('"tiny_sdpa"', '"plain_sdpa"'))
    text = text.replace('"tiny_sdpa"', '"watched_sdpa"') + VALIDATION
    (folder / "job.toml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Runs of four steps with loggers, validation and dumps, and without; one of a fixed step."""
    steps = ["--training.steps", "4"]
    flags = [*steps, "--metrics.enable-wandb", TENSORBOARD]
    text = (folder / "job.toml").read_text()
    (folder / "fixed.toml").write_text(text.replace('"watched_sdpa"', '"watched_sdpa_auto"'))
    scenarios = {
        "run": job(folder / "job.toml", *flags),
        "plain": job(folder / "plain_job.toml", *steps),
        "fixed": job(folder / "fixed.toml", "--training.steps", "1", "--debug.deterministic"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        return train(scenarios, folder, ranks=1)


@pytest.fixture(scope="module")
def run(trained, folder):
    """The folder of the run with everything."""
    return folder / "run"


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, folder):
    """The folder of a run of one step of two ranks with expert parallelism."""
    flags = ["--training.steps", "1", *EP_2, TENSORBOARD]
    apart = tmp_path_factory.mktemp("two")  # with a log of its own
    shutil.copytree(folder, apart, dirs_exist_ok=True, ignore=lambda *_: ["run", "plain", "fixed"])
    train({"both": job(apart / "job.toml", *flags)}, apart, ranks=2)
    return apart / "both"


def records(run):
    return [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]


def figures_of(record):
    """What the run computed, without its name and its date."""
    return {key: value for key, value in record.items() if key not in ("time", "model", "job")}


def test_a_record_says_what_ran_and_when(run):
    file = run / "telemetry.jsonl"
    dates = [each.time for each in read(file)]
    assert dates == sorted(dates)
    assert dates[-1].timestamp() == pytest.approx(file.stat().st_mtime, abs=3600)
    for each in read(file):
        assert (each.model, each.job) == ("watched_sdpa", str(run.parent / "job.toml"))


def test_the_file_has_a_line_for_the_first_step_and_every_second(run):
    assert [(each["step"], each["steps"]) for each in records(run)] == [(1, 1), (2, 1), (4, 2)]
    for each in records(run):
        for layer in each["layers"]:
            assert layer["tokens"] == each["steps"] * 2 * 128
            assert sum(layer["counts_E"]) == 3 * layer["tokens"]


def test_a_deterministic_run_times_nothing_and_a_record_names_what_computed(run):
    (record,) = read(run.parent / "fixed" / "telemetry.jsonl")
    assert (record.backend, record.computed_by) == ("auto", ("batched_mm_padded",))
    log = (run.parent / LOG).read_text()
    assert "deterministic algorithms are on, so nothing is timed" in log
    assert "measured now" not in log
    assert {each.computed_by for each in read(run / "telemetry.jsonl")} == {()}


def events_of(run):
    """What a run has written for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "tb").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_has_scalars_picture_and_histograms(run):
    events = events_of(run)
    assert "mfu(%)" not in events.Tags()["scalars"], "a share of an A100's peak, on a CPU"
    of_step_4 = records(run)[-1]
    (cv,) = (each.value for each in events.Scalars("moe/cv") if each.step == 4)
    assert cv == pytest.approx(of_step_4["figures"]["cv"], rel=1e-6)
    counts_E = of_step_4["layers"][0]["counts_E"]
    (frequency,) = (
        each.value for each in events.Scalars("moe/layer_1/expert_3/frequency") if each.step == 4
    )
    assert frequency == pytest.approx(counts_E[3] / sum(counts_E), rel=1e-6)
    assert [each.step for each in events.Images("moe/load")] == [1, 2, 4]
    assert events.Images("moe/load")[-1].width > 100
    histogram = events.Histograms("moe/layer_1/tokens_per_expert")[-1].histogram_value
    assert histogram.num == 8
    assert histogram.sum == sum(counts_E)


def logged(file: bytes):
    """The records of a file in LevelDB's log format, which wandb's is after seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(file):
        left = 2**15 - at % 2**15  # a record's parts lie within blocks
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", file, at + 4)
        parts += file[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_has_them_too(run):
    from wandb.proto import wandb_internal_pb2

    (path,) = run.rglob("offline-run-*/run-*.wandb")
    history = {}
    for data in logged(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        if items:
            history[record.history.step.num] = items
    assert json.loads(history[4]["moe/cv"]) == pytest.approx(records(run)[-1]["figures"]["cv"])
    assert json.loads(history[4]["moe/load/_type"]) == "image-file"
    assert sum(json.loads(history[4]["moe/layer_1/tokens_per_expert/values"])) == 8
    assert list(run.rglob("offline-run-*/files/media/images/moe/load_*.png"))


# Validation, and dumps ----------------------------------------------------------------------------


def test_validation_is_logged_with_the_hosts_and_changes_nothing_else(trained, folder):
    """Not a bit of the weights, nor of a record, which has the norm of the bias."""
    (of_run,), (of_plain,) = trained["run"], trained["plain"]
    assert_same_bits(of_run, of_plain)
    assert [figures_of(each) for each in records(folder / "run")] == [
        figures_of(each) for each in records(folder / "plain")
    ]
    events = events_of(folder / "run")
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("moe_val/")}
    assert {"moe_val/cv", "moe_val/aux_loss", "moe_val/layer_2/expert_7/frequency"} <= tags
    assert not any("drop_rate" in tag or "padding_waste" in tag for tag in tags)
    host_s = [each.step for each in events.Scalars("validation_metrics/loss")]
    assert [each.step for each in events.Scalars("moe_val/cv")] == host_s == [1, 2, 4]
    assert [each.value for each in events.Scalars("moe_val/tokens_per_expert")] == [
        3 * 2 * 128 * 3 / 8,  # steps, sequences, tokens, experts of a token, experts
    ] * 3


def test_validation_of_two_ranks_is_that_of_both(of_two_ranks):
    events = events_of(of_two_ranks)
    (tokens,) = events.Scalars("moe_val/tokens_per_expert")
    assert tokens.value == 2 * 3 * 2 * 128 * 3 / 8
    (busiest,) = events.Scalars("moe_val/rank_max_over_mean")
    assert 1 <= busiest.value <= 2
    frequencies = [
        events.Scalars(f"moe_val/layer_1/expert_{expert}/frequency")[0].value for expert in range(8)
    ]
    assert sum(frequencies) == pytest.approx(1, rel=1e-6)
    (loss,) = events.Scalars("moe_val/aux_loss")
    assert 1 <= loss.value < 8 / 3  # even, and the same three experts for every token


def dumps(run) -> dict[str, dict]:
    return {path.stem: dict(np.load(path)) for path in (run / "routing").iterdir()}


def test_a_dump_has_what_its_record_adds_up(run, folder):
    """In steps that are a record of their own, and with the size that the log names."""
    found = dumps(run)
    assert found.keys() == {"step_1_rank_0", "step_2_rank_0", "step_4_rank_0"}
    for record in records(run)[:2]:
        dump = found[f"step_{record['step']}_rank_0"]
        assert dump.keys() == {"layers", "mask", "ids", "probabilities"}
        assert dump["layers"].tolist() == [layer["layer"] for layer in record["layers"]]
        assert dump["mask"].shape == (256,)
        assert dump["mask"].all()
        assert (dump["ids"].shape, dump["ids"].dtype) == ((2, 256, 3), np.int16)
        p_LTE = dump["probabilities"]
        assert (p_LTE.shape, p_LTE.dtype) == ((2, 256, 8), np.float32)
        for ids_TK, p_TE, layer in zip(dump["ids"], p_LTE, record["layers"], strict=True):
            counts_E = np.bincount(ids_TK.ravel(), minlength=8)
            assert counts_E.tolist() == layer["counts_E"]
            # Four digits in the record.
            assert p_TE.mean(0) == pytest.approx(layer["probabilities_E"], rel=6e-4)
    said = re.search(r"\[telemetry\] dump: (\S+) MB to .*", (folder / LOG).read_text())
    size = 2 * 256 * (3 * 2 + 8 * 4)
    assert float(said[1]) == pytest.approx(size / 1e6, rel=5e-3)  # three digits
    assert "in step 1 and every 2 steps, in 1 file; this rank's has ids [2, 256, 3]" in said[0]


def test_each_rank_dumps_its_own_tokens(of_two_ranks):
    found = dumps(of_two_ranks)
    assert found.keys() == {"step_1_rank_0", "step_1_rank_1"}
    ids_RLTK = np.stack([dump["ids"] for dump in found.values()])
    (record,) = records(of_two_ranks)
    for number, layer in enumerate(record["layers"]):
        counts_E = np.bincount(ids_RLTK[:, number].ravel(), minlength=8)
        assert counts_E.tolist() == layer["counts_E"]
    assert not np.array_equal(*ids_RLTK)
    assert "in 2 files" in (of_two_ranks.parent / LOG).read_text()


def test_the_lines_in_the_documents_read_a_dump(run, tmp_path, monkeypatch, capsys):
    """They look at a step of a run in ``outputs``."""
    text = (Path(__file__).parent.parent / "docs" / "guides" / "telemetry.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(lines.splitlines()) <= 6
    (tmp_path / "outputs").mkdir()
    shutil.copytree(run / "routing", tmp_path / "outputs" / "routing")
    lines = lines.replace("step_1000_", "step_2_")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    said = capsys.readouterr().out.splitlines()
    loads = [list(map(int, re.findall(r"\d+", line.partition("]")[0]))) for line in said]
    layers = records(run)[1]["layers"]
    assert loads == [[layer["layer"], *layer["counts_E"]] for layer in layers]


# Each has a flavor that brings it about, and what is then said of it.
PROVOKED = {
    "dead": (
        """
        [router]
        routing = "balanced"
        skip_first_n_experts = 2
        [balance]
        bias_update = "none"
        [telemetry]
        alert_dead_steps = 3
        """,
        r"step 3, layers 1, 2, of which layer 1 is the worst: experts 0, 1 of 8 got no tokens for "
        r"3 steps \(.* alert_dead_steps = 3\)\. Remedy: routing = .balanced. leaves it to chance",
    ),
    "collapsed": (
        """
        [router]
        routing = "balanced"
        skip_first_n_experts = 5  # a token chooses three
        [balance]
        bias_update = "none"
        [telemetry]
        """,
        # After two steps of warm-up.
        r"step 3, layers 1, 2, of which layer 1 is the worst: router collapse: the load is that of "
        r"3\.0 of 8 experts, below 4\.2 ",
    ),
    "rising": (
        """
        [balance]
        bias_update = "none"
        [telemetry]
        alert_cv_rise = 1.5
        """,
        r"step \d, layer \d: load CV has risen to .* alert_cv_rise = 1\.5 times its lowest",
    ),
}


@pytest.fixture(scope="module")
def provoked(tmp_path_factory):
    """The folder of runs whose alerts are provoked: by the name of the run."""
    folder = job_folder(tmp_path_factory.mktemp("alerts"))
    text = (folder / "job.toml").read_text().replace("lr = 1e-2", "lr = 2e-2")
    scenarios = {}
    for name, (tables, _) in PROVOKED.items():
        (folder / f"{name}.toml").write_text(f'inherits = "tiny"\n{dedent(tables)}')
        (folder / f"{name}_job.toml").write_text(text.replace('"tiny_sdpa"', f'"{name}_sdpa"'))
        scenarios[name] = job(folder / f"{name}_job.toml", "--training.steps", "6")
    train(scenarios, folder, ranks=1)
    return folder


@pytest.mark.parametrize("name", PROVOKED)
def test_an_alert_is_raised_in_the_run_and_when_it_is_plotted(provoked, name):
    _, expected = PROVOKED[name]
    log = (provoked / LOG).read_text()
    alerts = list(map(str, course(provoked / name / "telemetry.jsonl").alerts))
    assert any(re.match(expected, alert) for alert in alerts), alerts
    assert all(f"ezpz_moe: {alert}" in log for alert in alerts)


def test_a_record_has_the_flavors_thresholds(provoked):
    last = read(provoked / "dead" / "telemetry.jsonl")[-1]
    assert last.thresholds == AlertThresholds(alert_dead_steps=3)


def test_a_record_has_what_the_run_does_already(provoked):
    last = read(provoked / "dead" / "telemetry.jsonl")[-1]
    assert last.warmup_steps == 2
    assert last.settings == {
        "router.routing": "balanced",
        "router.skip_first_n_experts": 2,
        "balance.bias_update": "none",
    }
    rising = read(provoked / "rising" / "telemetry.jsonl")[-1]
    assert rising.settings == {"balance.bias_update": "none"}


def test_a_router_that_is_not_finite_stops_the_run_with_layer_and_step(tmp_path):
    """A logit of -inf leaves the loss finite, so that the host would go on."""
    folder = job_folder(tmp_path)
    (folder / "watched.toml").write_text('base = "gpt_oss/debugmodel"\n[telemetry]\nevery = 2\n')
    text = (folder / "job.toml").read_text().replace('"tiny_sdpa"', '"watched_sdpa"')
    (folder / "job.toml").write_text(text)
    flags = [*precision("gpt_oss"), "--infinite-logit", "--layers=2"]
    with pytest.raises(AssertionError) as failure:
        train({"run": job(folder / "job.toml", *flags)}, folder, ranks=1)
    message = (
        r"router's logits in layer \d+ are not finite for \d+ tokens of the 1 steps up to step 1"
    )
    assert re.search(message, str(failure.value))


def test_drops_and_padding_are_those_of_the_counts(tmp_path):
    """One microbatch a step, so that the counts of a record say what was dropped in it.

    The flavor asks for no telemetry: whoever drops tokens reports them unasked.
    """
    folder = job_folder(tmp_path)
    (folder / "watched.toml").write_text(
        'inherits = "tiny"\ncompute_backend = "batched_mm_capacity(capacity_factor=1.0)"\n'
    )
    text = (folder / "job.toml").read_text().replace('"tiny_sdpa"', '"watched_sdpa"')
    (folder / "job.toml").write_text(text.replace('mode = "none"', 'mode = "full"'))
    train({"run": job(folder / "job.toml")}, folder, ranks=1)
    dropped_somewhere = 0
    for each in records(folder / "run"):
        for layer in each["layers"]:
            counts_E = layer["counts_E"]
            given, E = sum(counts_E), len(counts_E)
            C = math.ceil(given / E)
            dropped = sum(max(0, count - C) for count in counts_E)
            assert layer["drop_rate"] == pytest.approx(dropped / given, rel=1e-12)
            assert layer["padding_waste"] == pytest.approx(1 - (given - dropped) / (E * C))
            dropped_somewhere += dropped
        worst = max(layer["drop_rate"] for layer in each["layers"])
        assert each["figures"]["drop_rate_worst"] == worst
    assert dropped_somewhere > 0
