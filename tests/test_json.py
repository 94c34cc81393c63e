"""``--json`` of every command: the documented object on stdout, and nothing else there."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from checkpoint_cases import trained
from json_documents import documented
from telemetry_cases import layer, record
from torch.distributed import checkpoint

from ezpz_moe import cli
from ezpz_moe.cli.mistakes import options
from ezpz_moe.cli.signature import actions_of
from ezpz_moe.compute.tuning import Measured, Question, Situation
from ezpz_moe.hosts.rank_report import RankReport
from ezpz_moe.telemetry.json_lines import append
from ezpz_moe.tools import convert_hf, doctor, preflight, tune, verify
from ezpz_moe.tools.convert import Conversion
from ezpz_moe.tools.doctor import Finding
from ezpz_moe.tools.planned import Planned

JOB_0_2 = """
[model]
name = "deepseek_v3"
flavor = "debugmodel"
[training]
steps = 12345
"""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands silence the host's log, for their process only."""
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)


@pytest.fixture
def said(capsys):
    """Run a command with ``--json``, and return its exit code and the object."""

    def run(*arguments: object) -> tuple[int, dict]:
        code = cli.main([*map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


# They print what they write, and no figures.
WITHOUT_JSON = {"ckpt prune", "ckpt remap", "completion", "generate", "new", "upcycle"}


def test_every_other_command_has_its_object() -> None:
    named = {}
    for name, command in cli.commands().items():
        actions = {f"{name} {action}": class_ for action, class_ in actions_of(command)}
        named |= actions or {name: command}
    with_json = {name for name, command in named.items() if "--json" in options(command)}
    assert named.keys() - with_json == WITHOUT_JSON
    assert {name.partition(" --")[0] for name in documented()} == with_json


def test_flavors_are_counted_exactly(said, monkeypatch) -> None:
    monkeypatch.setattr("ezpz_moe.config.flavors.flavor_names", lambda: ["debugmodel"])
    code, found = said("flavors")
    assert (code, found.keys()) == (0, documented()["flavors"])
    (each,) = found["flavors"]
    assert each["name"] == "debugmodel"
    assert each["total"] > 10**7
    assert isinstance(each["total"], int)


def test_show_has_the_flavor_and_the_settings(said) -> None:
    code, found = said("show", "debugmodel_sdpa")
    assert (code, found.keys()) == (0, documented()["show"])
    assert found["flavor"]["attention"] == "sdpa"
    assert all(each.keys() == {"path", "value", "default"} for each in found["settings"])


def test_describe(said) -> None:
    code, found = said("describe", "debugmodel_sdpa")
    assert (code, found.keys()) == (0, documented()["describe"])
    assert isinstance(found["total"]["parameters"], int)
    assert found["total"]["parameters"] > 10**7


def test_verify_prints_every_tensor(said, monkeypatch) -> None:
    plan = verify.plan
    monkeypatch.setattr(verify, "plan", lambda *arguments: plan(*arguments)[:1])
    code, found = said("verify", "--device", "cpu", "--dtype", "float32")
    assert (code, found.keys()) == (0, documented()["verify"])
    assert len(found["rows"]) > 3


def test_bench_prints_what_it_would_write(said, tmp_path, capsys) -> None:
    sizes = ("--device", "cpu", "--shape", "2,4,4,4", "--repeats", 1, "--routing", "balanced")
    who = ("--backends", "for_loop", "--against", "dense", "--out", tmp_path / "file.json")
    code, found = said("bench", *sizes, *who)
    assert (code, found.keys()) == (0, documented()["bench"])
    assert found["measured"][0]["figures"].keys() == {"for_loop", "dense"}
    assert json.loads((tmp_path / "file.json").read_text()) == found


@pytest.mark.parametrize("is_broken", [False, True])
def test_doctor_has_a_state_for_each_line(said, monkeypatch, is_broken) -> None:
    of_this_machine, more = doctor.host_findings(), [Finding("c", "d", problem="e", vital=True)]
    monkeypatch.setattr(doctor, "host_findings", lambda: of_this_machine + more * is_broken)
    code, found = said("doctor")
    assert found.keys() == documented()["doctor"]
    states = [(each["what"], each["state"]) for each in found["findings"]]
    assert len(states) > 20
    assert (("c", "BROKEN") in states) == is_broken
    assert code == any(state == "BROKEN" for _, state in states)


# Made up, because a real one starts two processes, each of which imports the host:
# tests/hosts/test_preflight.py has those.
def test_preflight_has_bytes_and_errors(said, monkeypatch) -> None:
    reports = [RankReport(0, 10, 160, "whole"), RankReport(4, error="too big")]
    monkeypatch.setattr(preflight, "preflight", lambda *arguments, **others: iter(reports))
    code, found = said("preflight", "debugmodel", "--world-size", 8)
    assert (code, found.keys()) == (1, documented()["preflight"])
    whole = {"rank": 0, "parameters": 10, "state_bytes": 160, "step": "whole", "error": None}
    assert found["ranks"][0] == {"stage": 0, **whole}
    assert found["ranks"][1]["error"] == "too big"


def test_ckpt_inspect(said, tmp_path) -> None:
    checkpoint.save(trained(), checkpoint_id=tmp_path / "step-7", no_dist=True)
    code, found = said("ckpt", "inspect", tmp_path / "step-7")
    assert (code, found.keys()) == (0, documented()["ckpt inspect"])
    assert (found["step"], found["experts"], found["optimizer"]) == (7, 5, True)
    assert isinstance(found["bytes"], int)


def test_convert_has_every_key_and_the_new_text(said, tmp_path) -> None:
    (tmp_path / "old.toml").write_text(JOB_0_2)
    code, found = said("convert", tmp_path / "old.toml", tmp_path / "new.toml")
    assert (code, found.keys()) == (0, documented()["convert"])
    assert "training.steps" in {each["key"] for each in found["changes"]}
    assert str(tmp_path / "new.toml") in found["written"]
    assert (tmp_path / "new.toml").read_text() == found["text"]


def test_convert_from_has_what_differs(said, tmp_path, monkeypatch) -> None:
    made = Conversion((), differences=("a differs",), notes=("b is near",), refusal="no")
    monkeypatch.setattr(convert_hf, "from_hf", lambda path: made)
    code, found = said("convert", "--from", "hf", tmp_path / "config.json")
    assert (code, found.keys()) == (1, documented()["convert --from"])
    assert (found["differences"], found["refusal"]) == (["a differs"], "no")


def test_convert_lint_has_every_flag(said, tmp_path) -> None:
    script = tmp_path / "train.sh"
    script.write_text("python -m torchtitan.train --module ezpz_moe --trainng.steps 5\n")
    code, found = said("convert", "--lint", script)
    assert (code, found.keys()) == (1, documented()["convert --lint"])
    dead = [each["flag"] for each in found["flags"] if each["remedy"]]
    assert dead == ["--trainng.steps"]


def test_plot_has_the_last_record_and_the_files(said, tmp_path) -> None:
    append(tmp_path / "telemetry.jsonl", record(layer([3, 1])))
    code, found = said("plot", tmp_path)
    assert (code, found.keys()) == (0, documented()["plot"])
    assert found["last"]["layers"][0]["counts_E"] == [3, 1]
    assert all(Path(each).is_file() for each in found["files"])


def test_the_trainers_flags_and_a_dry_run(said) -> None:
    code, found = said("train", "--help-trainer")
    assert (code, found.keys()) == (0, documented()["train --help-trainer"])
    assert "training.steps" in {each["name"] for each in found["flags"]}
    assert {each.name for each in fields(Planned)} == documented()["train --dry-run"]


# Made up, because a real one is a training run: tests/hosts/test_tune.py has those.
def test_tune_has_what_was_measured(said, monkeypatch) -> None:
    question = Question("mm", ("for_loop",), "cpu", "float32", (8, 4, 2), False)
    measured = [(Situation(question, 64, 2), Measured({"for_loop": 1.5, "triton": None}))]
    monkeypatch.setattr(tune, "tune", lambda *arguments, **others: (0, measured))
    code, found = said("tune", "job.toml")
    assert (code, found.keys()) == (0, documented()["tune"])
    assert found["measured"][0]["milliseconds"] == {"for_loop": 1.5, "triton": None}
    assert found["measured"][0]["torch"] == torch.__version__


def test_what_the_trainer_logs_does_not_reach_stdout(capfd, monkeypatch) -> None:
    """Its processes inherit the file descriptor, and not Python's own sys.stdout."""

    def trained(*arguments, **others):
        subprocess.run(["echo", "step: 1"], check=True)
        return 0, []

    monkeypatch.setattr(tune, "tune", trained)
    assert cli.main(["tune", "job.toml", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["measured"] == []
    assert "step: 1" in err


def test_after_a_mistake_stdout_is_empty(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["show", "no_such_flavor", "--json"])
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out) == (2, "")
    assert captured.err.startswith("ezpz-moe: error: ")
