"""``ezpz-moe preflight``: ranks of a big run, built here by the host's own trainer."""

from __future__ import annotations

import pytest
from dialect import ON_0_2

from ezpz_moe import cli
from ezpz_moe.errors import EzpzError
from ezpz_moe.flavors import load_flavor
from ezpz_moe.hosts import binding, check_host
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.preflight import RankReport, preflight

FLAVOR = "debugmodel_sdpa_for_loop"
PIPELINE = f"""
[model]
name = "ezpz_moe"
flavor = "{FLAVOR}"
[training]
local_batch_size = 4
[parallelism]
pipeline_parallel_degree = 2
"""
COUNTS = "not run: the router counts tokens, which have no value"
EXPERTS = ("--parallelism.expert_parallel_degree", "4")

pytestmark = pytest.mark.train


needs_all_ranks = pytest.mark.skipif(
    host_name() == "0.2.1", reason="the fake communication of torchtitan 0.2.1 is of rank 0 alone"
)


@pytest.fixture
def pipeline(job_file) -> str:
    """A job with two stages."""
    return str(job_file(PIPELINE))


def build(config: str, *flags: str, world_size: int, stages: int = 1) -> list[RankReport]:
    return list(preflight(config, list(flags), world_size=world_size, stages=stages))


def total_parameters() -> int:
    check_host()
    return binding("parameters").summarize(load_flavor(FLAVOR)).total


@needs_all_ranks
def test_the_shards_of_all_ranks_are_the_whole_model(pipeline) -> None:
    """Every dimension is a multiple of the ranks, so that the ranks of a stage are alike."""
    reports = build(pipeline, world_size=8, stages=2)
    assert [report.rank for report in reports] == [0, 4]
    assert 4 * sum(report.parameters for report in reports) == total_parameters()
    for report in reports:
        assert report.state_bytes == 16 * report.parameters
        assert report.step == (
            COUNTS if ON_0_2 else "not run: a pipeline stage needs its neighbours"
        )


def test_expert_parallelism_is_laid_out_and_its_step_is_not_run() -> None:
    (report,) = build(FLAVOR, *EXPERTS, world_size=8)
    assert 8 * report.parameters == total_parameters()
    assert report.step.startswith(COUNTS if ON_0_2 else "not run: the dispatch of expert")


def test_a_sharded_step_is_run_without_values() -> None:
    (report,) = build(FLAVOR, "--parallelism.tensor_parallel_degree", "2", world_size=8)
    assert report.error == ""
    assert report.step == (COUNTS if ON_0_2 else "forward and backward")


@needs_all_ranks
def test_an_error_of_the_host_is_the_ranks_report(pipeline) -> None:
    """The schedule is known, and too long for six layers: only the host finds that out."""
    schedule = ("--parallelism.pipeline_parallel_schedule", "Interleaved1F1B")
    layers = ("--parallelism.pipeline_parallel_layers_per_stage", "4")
    reports = build(pipeline, *schedule, *layers, world_size=2, stages=2)
    assert [report.parameters for report in reports] == [None, None]
    assert reports[0].error == reports[1].error
    assert reports[0].error.startswith("ValueError: ")


def test_what_the_command_prints(capsys) -> None:
    assert cli.main(["preflight", "16B", "--world-size", "64", *EXPERTS]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "16B on 64 ranks" in said
    assert "0 0 255.3 M 3.80 GiB not run" in said


@needs_all_ranks
def test_a_mistake_is_said_once_and_is_exit_code_1(capsys, pipeline) -> None:
    degree = ("--parallelism.expert-parallel-degree", "3")
    assert cli.main(["preflight", pipeline, "--world-size", "12", *degree]) == 1
    said = capsys.readouterr().out
    assert f"rank 0, 6: {pipeline} and the command line:" in said
    assert said.count("does not divide the 8 experts") == 1


@pytest.mark.skipif(host_name() != "0.2.1", reason="what torchtitan 0.2.1 cannot do")
def test_other_ranks_than_the_first_are_refused_in_plain_words(pipeline) -> None:
    first, second = build(pipeline, world_size=8, stages=2)
    assert first.error == ""
    assert second.error.endswith("Use torchtitan 0.2.2.")


def test_ranks_that_the_stages_cannot_share(pipeline) -> None:
    with pytest.raises(EzpzError, match=r"--world-size 7: has to be a multiple of .* = 2"):
        build(pipeline, world_size=7, stages=2)
