"""What a router's training keeps over time: schedules in a resumed run, and a frozen gate."""

import json
from pathlib import Path

import pytest
from dialect import ON_0_2, SINCE_2026_08
from trainer_runs import door_1, job_folder, train

pytestmark = [
    pytest.mark.train,
    pytest.mark.ranks,
    pytest.mark.skipif(ON_0_2 or SINCE_2026_08, reason="the flags are those of torchtitan 0.3"),
]

GATES = [f"layers.{layer}.moe.router.gate.weight" for layer in (1, 2)]
SCHEDULED = """
inherits = "tiny"

[router]
temperature = {start = 4.0, end = 0.5, steps = 4}

[balance]
bias_update = "proportional"
bias_rate = {start = 0.1, end = 0.01, steps = 4}

[telemetry]
images = false
"""
FROZEN = """
inherits = "tiny"

[router]
freeze = true

[balance]
aux_loss = 1.0
z_loss = 1.0
"""
STEPS = ["--training.steps", "4", "--training.local-batch-size", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = job_folder(tmp_path_factory.mktemp("schedules"))
    job = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(job.replace("lr = 1e-2", "weight_decay = 0.5\nlr = 1e-2"))
    (folder / "scheduled.toml").write_text(SCHEDULED)
    (folder / "frozen.toml").write_text(FROZEN)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Four steps, and the last two of them from a checkpoint."""
    saving = ["--checkpoint.enable", "--checkpoint.interval", "2"]
    loading = ["--checkpoint.initial-load-path", str(folder / "whole" / "checkpoint" / "step-2")]
    scenarios = {
        "whole": door_1(folder, "scheduled_sdpa", *STEPS, *saving),
        "resumed": door_1(
            *(folder, "scheduled_sdpa", *STEPS, *saving, *loading),
            "--checkpoint.no-initial-load-model-only",
        ),
    }
    return train(scenarios, folder, ranks=1)


def telemetry(folder: Path, name: str) -> list[dict]:
    """A run's records, without the time at which each was written."""
    lines = (folder / name / "telemetry.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert all(record.pop("time") for record in records)
    return records


def test_a_resumed_run_goes_on_with_its_schedules(runs, folder):
    """Bit for bit: another temperature would give another loss, another rate another bias."""
    (whole,), (resumed,) = runs["whole"], runs["resumed"]
    assert resumed["losses"] == whole["losses"][2:]
    assert resumed["gradient_norms"] == whole["gradient_norms"][2:]
    assert resumed["parameters"] == whole["parameters"]
    assert telemetry(folder, "resumed") == telemetry(folder, "whole")[2:]


def test_a_frozen_gate_stays_as_it_is_under_weight_decay(folder, runs):
    """On two ranks that share its weight out, with losses that have a gradient for it."""
    scenarios = {"frozen": door_1(folder, "frozen_sdpa", *STEPS)}
    (frozen, _) = train(scenarios, folder, ranks=2)["frozen"]
    trained = runs["whole"][0]
    for before, after, is_same in (
        (frozen["first_parameters"], frozen["parameters"], True),
        (trained["first_parameters"], trained["parameters"], False),
    ):
        assert all((before[name] == after[name]) is is_same for name in GATES)
        others = before.keys() - GATES
        assert others
        assert all(before[name] != after[name] for name in others)
