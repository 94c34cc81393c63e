"""Telemetry of a real run: its file, wandb offline, TensorBoard, and what stops a run."""

import json
import math
import re
import struct
from textwrap import dedent

import pytest
from dialect import ON_0_2, job, precision
from trainer_runs import LOG, job_folder, train

from ezpz_moe.config.routing_schema import AlertThresholds
from ezpz_moe.telemetry.json_lines import read
from ezpz_moe.telemetry.plot import raised

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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four steps with both loggers."""
    folder = job_folder(tmp_path_factory.mktemp("telemetry"))
    (folder / "watched.toml").write_text(FLAVOR)
    text = (folder / "job.toml").read_text().replace('"tiny_sdpa"', '"watched_sdpa"')
    (folder / "job.toml").write_text(text)
    flags = ["--training.steps", "4", "--metrics.enable-wandb", "--metrics.enable-tensorboard"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        (folder / "fixed.toml").write_text(text.replace('"watched_sdpa"', '"watched_sdpa_auto"'))
        fixed = job(folder / "fixed.toml", "--training.steps", "1", "--debug.deterministic")
        train({"run": job(folder / "job.toml", *flags), "fixed": fixed}, folder, ranks=1)
    return folder / "run"


def records(run):
    return [json.loads(line) for line in (run / "telemetry.jsonl").read_text().splitlines()]


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


def test_tensorboard_has_scalars_picture_and_histograms(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (run / "tb").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
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
    alerts = raised(read(provoked / name / "telemetry.jsonl"))
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
