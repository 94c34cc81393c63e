"""``ezpz-moe preflight``: ranks of a big run, built here by the host's own trainer."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
from dialect import ON_0_2

import ezpz_moe.tools.preflight
from ezpz_moe import cli
from ezpz_moe.config.flavors import load_flavor
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts.cpu import no_accelerator
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.installed import host_name
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.hosts.ranks import share_of_model
from ezpz_moe.tools.preflight import preflight

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

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("forked_processes")]


needs_all_ranks = pytest.mark.skipif(
    host_name() == "0.2.1", reason="torchtitan 0.2.1 can fake only rank 0"
)


@pytest.fixture
def pipeline(job_file) -> str:
    """A job with two stages."""
    return str(job_file(PIPELINE))


def build(config: str, *flags: str, world_size: int, stages: int = 1) -> list[RankReport]:
    return list(preflight(config, list(flags), world_size=world_size, stages=stages))


def total_parameters() -> int:
    check_host()
    return host().summarize(load_flavor(FLAVOR)).total


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


@pytest.mark.skipif(ON_0_2, reason="torchtitan 0.2 refuses [router]")
def test_a_batch_says_which_labels_count(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(
        'inherits = "debugmodel"\n[router]\npadding = "labels"\ndispatch_padding = true\n'
    )
    job = tmp_path / "job.toml"
    job.write_text('[model]\nname = "ezpz_moe"\nflavor = "mine_sdpa_for_loop"\n')
    (report,) = build(str(job), world_size=2)
    assert (report.error, report.step) == ("", "forward and backward")


@pytest.mark.parametrize("more", [(), ("--parallelism.tensor_parallel_degree", "2")])
def test_flex_attention_gets_its_masks_as_in_training(more) -> None:
    (report,) = build("debugmodel", *more, world_size=4)
    assert report.error == ""
    assert 4 * report.parameters == pytest.approx(total_parameters(), rel=0.03)
    if ON_0_2:
        assert report.step == COUNTS
    elif no_accelerator():
        assert report.step == "forward; its attention has no backward on the CPU"
    else:
        assert report.step == "forward and backward"


@pytest.mark.skipif(ON_0_2, reason="torchtitan 0.2's router counts tokens, so that no step is run")
@pytest.mark.parametrize(
    ("flavor", "flags", "reason"),
    [
        ("debugmodel_varlen", (), "aten.nonzero.default reads values, which the tensors do not"),
        (
            "debugmodel",
            ("--parallelism.context_parallel_degree", "2"),
            "context parallelism splits",
        ),
    ],
)
def test_a_step_that_needs_values_or_ranks_is_not_run_and_no_error(flavor, flags, reason) -> None:
    (report,) = build(flavor, *flags, world_size=4)
    assert report.error == ""
    assert 4 * report.parameters == total_parameters()
    assert report.step.startswith(f"not run: {reason}")


@pytest.mark.skipif(ON_0_2, reason="torchtitan 0.2's router counts tokens, so that no step is run")
def test_a_step_that_fails_keeps_what_was_measured() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        report = pool.submit(report_with_failing_step, FLAVOR, 4).result()
    assert 4 * report.parameters == total_parameters()
    assert report.state_bytes == 16 * report.parameters
    assert report.step == "failed"
    assert report.error.startswith("RuntimeError: no such shape (in a step with tensors that have")


def report_with_failing_step(config: str, world_size: int) -> RankReport:
    def fail(*args: object) -> str:
        raise RuntimeError("no such shape")

    check_host()
    from ezpz_moe.hosts.titan import preflight

    preflight._step = fail
    return ezpz_moe.tools.preflight._run(
        ezpz_moe.tools.preflight._run_rank, config, [], world_size, 0
    )


@pytest.mark.parametrize("more", ["tensor_parallel_degree", "expert_parallel_degree"])
def test_the_doctors_share_of_the_model_is_what_a_rank_holds(more) -> None:
    replicate = ("--parallelism.data_parallel_replicate_degree", "2")
    (report,) = build(FLAVOR, *replicate, f"--parallelism.{more}", "2", world_size=8)
    share = share_of_model(SimpleNamespace(data_parallel_replicate_degree=2), 8)
    assert report.parameters == pytest.approx(share * total_parameters(), rel=0.03)


def test_heads_that_tensor_parallelism_cannot_divide() -> None:
    (report,) = build(FLAVOR, "--parallelism.tensor_parallel_degree", "3", world_size=3)
    assert "does not divide the 16 attention heads" in report.error


def test_a_process_that_is_killed_is_said_with_its_rank(monkeypatch, capsys, pipeline) -> None:
    monkeypatch.setattr(ezpz_moe.tools.preflight, "_run", die_as_rank_4)
    assert build(pipeline, world_size=4) == [RankReport(0)]
    with pytest.raises(SystemExit) as end:
        cli.main(["preflight", pipeline, "--world-size", "8"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "error: rank 4 of 8: the process that built it died." in said
    assert "where more memory is free" in said


def die_as_rank_4(_, config: str, host_flags: list[str], world_size: int, rank: int) -> RankReport:
    if rank == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return RankReport(rank)


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
    longer = ("--training.seq-len", "100000")  # than the model's positions
    assert cli.main(["preflight", pipeline, "--world-size", "12", *longer]) == 1
    said = capsys.readouterr().out
    assert f"rank 0, 6: {pipeline} and the command line:" in said
    assert said.count("training.seq_len = 100000") == 1


@pytest.mark.skipif(host_name() != "0.2.1", reason="what torchtitan 0.2.1 cannot do")
def test_other_ranks_than_the_first_are_refused_in_plain_words(pipeline) -> None:
    first, second = build(pipeline, world_size=8, stages=2)
    assert first.error == ""
    assert second.error.endswith("Use torchtitan 0.2.2.")


def test_what_was_measured_is_shown_beside_an_error(monkeypatch, capsys) -> None:
    report = RankReport(0, parameters=10**6, state_bytes=2**30, step="failed", error="why")
    monkeypatch.setattr(ezpz_moe.tools.preflight, "preflight", lambda *args, **options: [report])
    assert cli.main(["preflight", FLAVOR, "--world-size", "4"]) == 1
    said = capsys.readouterr().out
    assert "0 0 1.0 M 1.00 GiB failed" in " ".join(said.split())
    assert said.endswith("rank 0: why\n")


@pytest.mark.parametrize("number", ["0", "-8"])
def test_no_number_of_ranks(number, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["preflight", FLAVOR, "--world-size", number])
    assert end.value.code == 2
    assert f"--world-size {number}: a run needs at least 1 rank" in capsys.readouterr().err


def test_ranks_that_the_stages_cannot_share(pipeline) -> None:
    with pytest.raises(EzpzError, match=r"--world-size 7: must be a multiple of .* = 2"):
        build(pipeline, world_size=7, stages=2)
