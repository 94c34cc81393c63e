"""``ezpz-moe plan``: what it says, the job that it writes, and the mistakes it names."""

import json
from pathlib import Path

import pytest

from ezpz_moe import cli
from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError
from ezpz_moe.hosts.detect import host
from ezpz_moe.hosts.jobs import find_job
from ezpz_moe.hosts.titan.v0_3 import Titan03

if type(host()) is not Titan03:
    pytest.skip("about the binding to torchtitan 0.3", allow_module_level=True)

from ezpz_moe.tools.planning import plans, written
from ezpz_moe.tools.planning.cuts import Cut

DEBUG = "debugmodel_sdpa_for_loop"
JOB = """\
# ours
[model]
name = "ezpz_moe"
flavor = "debugmodel_sdpa"
[training]
local_batch_size = 4 # as it was
seq_len = 128
[parallelism]
expert_parallel_degree = 2
"""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEBUG_VARIABLE, "0")


def test_a_cut_is_written_into_the_job_and_the_rest_stays(tmp_path):
    (tmp_path / "job.toml").write_text(JOB)
    job = find_job(str(tmp_path / "job.toml"))
    cut = Cut(2, 1, 2, 2, 4, 2, 8, "full")
    out = tmp_path / "new" / "cut.toml"
    written.write_job(out, job, [], cut)
    assert out.read_text().startswith("# ours\n[model]\nname")
    values = find_job(str(out)).values
    assert values["training.seq_len"] == 128
    assert values["training.local_batch_size"] == 16
    assert values["training.global_batch_size"] == 32
    assert values["parallelism.pipeline_parallel_microbatch_size"] == 2
    assert values["activation_checkpoint.mode"] == "full"
    assert plans.job_cut(host().planning().model_sheet(str(out), []), 8) == cut
    with pytest.raises(EzpzError, match="is there already, and nothing is overwritten"):
        written.write_job(out, job, [], cut)
    with pytest.raises(EzpzError, match="would not be in it"):
        written.write_job(tmp_path / "other.toml", job, ["--training.steps", "3"], cut)
    assert not (tmp_path / "other.toml").exists()


def test_a_job_is_written_only_where_it_finds_its_flavor_and_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my").mkdir()
    Path("my/mine.toml").write_text('inherits = "debugmodel"\n')
    Path("my/job.toml").write_text(JOB.replace("debugmodel_sdpa", "mine_sdpa"))
    with pytest.raises(SystemExit):
        cli.main(["plan", "my/job.toml", "--world-size", "2", "--out", "new/best.toml"])
    ended = capsys.readouterr()
    assert "flavor 'mine_sdpa' is found beside my/job.toml" in ended.err
    assert "Write my/best.toml." in ended.err
    # Before the plan, which takes its time.
    assert ended.out == ""
    assert not Path("new").exists()
    written.check_target(Path("my/best.toml"), find_job("my/job.toml"), [])
    Path("my/texts").mkdir()
    Path("my/other.toml").write_text(JOB.replace("seq_len", 'dataset_path = "texts"\nseq_len'))
    with pytest.raises(EzpzError, match=r"training.dataset_path = 'texts' is found beside my/othe"):
        written.check_target(Path("best.toml"), find_job("my/other.toml"), [])


def test_the_command_says_the_same_as_its_json(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(JOB)
    command = ["plan", "job.toml", "--world-size", "8", "--why", "tp=2", "--load", "zipf1"]
    assert cli.main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    times = [row["step_ms"] for row in told["best"]]
    assert times == sorted(times)
    assert told["sequences"] == 32
    assert told["with_choice"]["tp"] == 2
    assert told["own"]["ep"] == 2
    assert cli.main([*command, "--out", "best.toml"]) == 0
    said = capsys.readouterr().out
    best = told["best"][0]
    assert (
        f"dp_shard={best['dp_shard']} dp_replicate={best['dp_replicate']} tp={best['tp']}" in said
    )
    assert "slower than the best" in said
    assert "which does not fit" not in said
    # The terms that are alike differ in their last bits, or not at all.
    assert "-0.0" not in said
    assert Path("best.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "plan: how many ranks? Give --world-size"),
        (["--world-size", "12"], "--world-size 12: is no multiple of the 8 ranks of a node"),
        (["--world-size", "8", "--why", "tq=2"], "'tq' is no choice. There are dp_shard"),
        (["--world-size", "8", "--why", "ep=3"], "ep=3 does not divide the"),
        (["--world-size", "8", "--why", "ac=ful"], "no ac=ful. Did you mean 'full'?"),
        (["--world-size", "8", "--why", "tp=two"], "tp is a number of at least 1, not 'two'"),
        (["--world-size", "8", "--why", "tp=2 tp=4"], "names tp twice"),
        (["--world-size", "1", "--why", "dp_shard=5"], "dp_shard=5 does not divide the 1 ranks"),
        (["--world-size", "1", "--why", "microbatch=64"], "microbatch=64 is over 32"),
        (["--world-size", "8", "--ranks-per-node", "0"], "--ranks-per-node 0: must be at least 1"),
        (["--world-size", "8", "--out", "job.txt"], "a job's name ends in .toml"),
        (["--world-size", "8", "--machine", "h10"], "there is no such machine"),
        (
            [
                *("--world-size", "8", "--parallelism.context-parallel-degree", "2"),
                *("--parallelism.spmd-backend", "partial_dtensor"),
            ],
            "context parallelism is not planned",
        ),
    ],
)
def test_mistakes_are_said_in_a_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", DEBUG, *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["m.json"], "--calibrate m.json: a machine's file ends in .toml"),
        (["there.toml"], "--calibrate there.toml: is there already, and nothing is overwritten"),
        (["no/m.toml"], "--calibrate no/m.toml: there is no folder no"),
        (["m.toml"], "--calibrate: links are measured between ranks. Start several: --nproc 2"),
        (["m.toml", "--nproc", "0"], "--nproc 0: must be at least 1"),
        (["m.toml", "--nproc", "2", "--why", "tp=2"], "--why: --calibrate measures a machine and"),
        (["m.toml", "--world-size", "2"], "--world-size: --calibrate measures a machine and"),
    ],
)
def test_a_calibration_that_cannot_be_is_said_before_torch_is_imported(
    arguments, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("there.toml").touch()
    monkeypatch.setattr("ezpz_moe.cli.plan.import_host", lambda: pytest.fail("torch is imported"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", DEBUG, "--calibrate", *arguments])
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert [each.name for each in tmp_path.iterdir()] == ["there.toml"]


def test_a_model_that_fits_nowhere_is_an_answer(capsys):
    assert cli.main(["plan", "671B_sdpa", "--world-size", "8"]) == 1
    assert "None of the" in capsys.readouterr().out
