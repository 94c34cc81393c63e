"""Validation in a run: it needs no dataset of its own, and training goes on as without it."""

import pytest
import torch
from dialect import job
from trainer_runs import LOG, assert_same_bits, job_folder, train

from ezpz_moe.hosts.documents import VALIDATES_ON_TRAINING_TEXT

pytestmark = pytest.mark.train

VALIDATION = """
[validation]
enable = true
freq = 1
steps = 2
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = job_folder(tmp_path_factory.mktemp("validation"))
    (folder / "validated.toml").write_text((folder / "job.toml").read_text() + VALIDATION)
    jobs = {name: job(folder / f"{name}.toml") for name in ("job", "validated")}
    return train(jobs, folder, ranks=1), (folder / LOG).read_text()


@pytest.mark.smoke
def test_a_job_that_trains_offline_validates_offline(runs):
    """On the training text, and it says so: the host's default asks a hub after the first step."""
    _, log = runs
    assert log.count(VALIDATES_ON_TRAINING_TEXT) == 1
    assert log.count("validate step:") == 3
    assert "c4" not in log


@pytest.mark.smoke
def test_training_goes_on_as_without_validation(runs):
    records, _ = runs
    (without,), (validated,) = records["job"], records["validated"]
    assert without["biases"]
    assert all(bias.any() for bias in without["biases"].values())
    for name, bias_E in without["biases"].items():
        assert torch.equal(validated["biases"][name], bias_E), name
    assert_same_bits(validated, without)
