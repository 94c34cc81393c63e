"""Commands that need no model answer without what takes seconds to import, and so do mistakes.

The command lines are those of ``benchmarks/answers.py``, which times them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from answers import CASES, HEAVY, MISTAKE, Case, write_checkpoint, write_files

from ezpz_moe.config.flavors import flavor_names, load_flavor
from ezpz_moe.config.job import Job
from ezpz_moe.config.older_keys import OLDER_KEYS
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import accelerator, counts, releases
from ezpz_moe.hosts.command_line import HostFlag
from ezpz_moe.hosts.detect import check_host, host
from ezpz_moe.hosts.host_flags import asked_flags, known_flags
from ezpz_moe.hosts.job_settings import settings_at_hand
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.hosts.precision import as_on_an_accelerator
from ezpz_moe.hosts.titan.v0_3 import Titan03
from ezpz_moe.hosts.titan_0_2.v0_2 import Titan02
from ezpz_moe.tools import early_refusals, flag_remedies, trainer_flags
from ezpz_moe.tools.flag_remedies import keys_by_spelling

# A process that has imported the commands forks for each line; the fork says how it ended, and
# what it has imported.
ANSWER_ALL = """
import json, os, sys
from ezpz_moe import cli
cli.commands()
lines, heavy = json.loads(sys.argv[1])
for line in lines:
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(writer, 2)
        code = 1
        try:
            code = cli.main(line.split())
        except SystemExit as stop:
            code = stop.code
        finally:
            imported = sorted(set(heavy) & set(sys.modules))
            sys.stderr.write("\\0" + json.dumps([code, imported]))
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        told, _, ended = said.read().rpartition("\\0")
    os.waitpid(pid, 0)
    print(json.dumps([line, told, *json.loads(ended)]))
"""
QUICK = [case for case in CASES if not set(case.imports) >= {"torch"}]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[str, int, list[str]]]:
    """By command line: what went to stderr, the exit code, the heavy modules."""
    scratch = tmp_path_factory.mktemp("answers")
    write_files(scratch)
    write_checkpoint(scratch / "step-1")
    done = subprocess.run(
        [sys.executable, "-c", ANSWER_ALL, json.dumps([[case.line for case in QUICK], HEAVY])],
        cwd=scratch,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {line: (told, code, heavy) for line, told, code, heavy in rows}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.line)
def test_an_answer_imports_nothing_heavy(case: Case, answers) -> None:
    told, code, heavy = answers[case.line]
    assert set(heavy) <= set(case.imports)
    if case.line == "train debugmodel" and not accelerator.has_certainly_none():
        pytest.skip("only torch can tell whether there is an accelerator here")
    if case.code is not None:
        assert code == case.code, told
    assert "Traceback" not in told
    if case.goal == MISTAKE and told.startswith("ezpz-moe: error"):
        assert len(told.splitlines()) == 1


# --- facts of the host ------------------------------------------------------------------------


def test_the_shipped_flags_are_those_of_the_host() -> None:
    """On a machine of any kind, in the host's order, with every default and help."""
    assert known_flags() == asked_flags()


def test_a_host_with_an_edited_file_is_not_a_known_one(tmp_path) -> None:
    (tmp_path / "config").mkdir()
    for text in ("steps = 1", "steps = 2"):
        (tmp_path / "config" / "a.py").write_text(text)
        found = releases.fingerprint(tmp_path)
        (tmp_path / "config" / "a.py").rename(tmp_path / "b.py")
        assert releases.fingerprint(tmp_path) != found, "it is in another folder"
        (tmp_path / "b.py").rename(tmp_path / "config" / "a.py")
    (tmp_path / "config" / "a.py").write_text("steps = 1")
    assert releases.fingerprint(tmp_path) != found


def test_of_an_unknown_host_no_flag_is_refused_and_no_model_is_counted(monkeypatch) -> None:
    for module in (counts, trainer_flags, early_refusals):
        monkeypatch.setattr(module, "facts", lambda: None)
    trainer_flags.refuse_wrong_flags(["--no.such.flag"], [])
    assert counts.counts_at_hand(load_flavor("qwen3_debugmodel")) is None
    assert counts.counts_at_hand(load_flavor("16B")) is not None, "its sizes are at hand"


COUNTED = ["debugmodel", "500M", "gpt_oss_debugmodel", "qwen3_debugmodel"]


@pytest.mark.parametrize(
    "name",
    [
        *COUNTED,
        *(pytest.param(n, marks=pytest.mark.full) for n in flavor_names() if n not in COUNTED),
    ],
)
def test_the_counts_at_hand_are_those_of_the_built_model(name: str) -> None:
    check_host()
    flavor = load_flavor(name)
    assert counts.counts_at_hand(flavor) == host().summarize(flavor)


SIZES = {
    "queries that are compressed": "q_lora_rank = 24\n",
    "more shared experts, another top-k": "num_shared_experts = 3\nrouter_top_k = 5\n",
    "dense layers": "n_dense_layers = 3\n",
    "a precision of its own": 'compute_backend = "for_loop"\nexpert_precision = "float32"\n',
}


@pytest.mark.parametrize("table", SIZES.values(), ids=SIZES)
def test_the_counts_of_a_flavor_of_the_users_own(table: str, tmp_path) -> None:
    check_host()
    (tmp_path / "mine.toml").write_text(f'inherits = "debugmodel"\n{table}')
    flavor = load_flavor("mine", near=tmp_path)
    assert counts.counts_at_hand(flavor) == host().summarize(flavor)


def test_constant_experts_are_not_counted_with_arithmetic(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(
        'inherits = "debugmodel"\n[router]\nconstant_experts = 2\n[balance]\naux_loss = 0.01\n'
    )
    assert counts.counts_at_hand(load_flavor("mine", near=tmp_path)) is None


@pytest.mark.parametrize("name", ["debugmodel", "debugmodel_sdpa", "qwen3_debugmodel"])
def test_which_attention_needs_an_accelerator(name: str) -> None:
    check_host()
    flavor = load_flavor(name)
    assert early_refusals._needs_accelerator(flavor) == host().needs_accelerator(flavor)


def test_what_may_change_the_model_is_left_to_the_host(monkeypatch) -> None:
    monkeypatch.setattr(accelerator, "has_certainly_none", lambda: True)
    for flag in ("--override.imports", "--config", "--comm.mode"):
        early_refusals.refuse_attention(Job("debugmodel"), [flag, "x"])
    with pytest.raises(EzpzError, match=r"Use flavor 16B_sdpa_for_loop\."):
        early_refusals.refuse_attention(Job("16B_for_loop"), ["--training.steps", "1"])
    monkeypatch.setattr(accelerator, "has_certainly_none", lambda: False)
    early_refusals.refuse_attention(Job("16B_for_loop"), [])


@pytest.mark.parametrize(
    ("files", "name", "remedy"),
    [
        (["mini_flex"], "mini_flex", "Use flavor mini_flex_sdpa."),
        (["mini", "mini_sdpa"], "mini_flex", 'Set attention = "sdpa" in FOLDER/mini.toml.'),
        (["mini_for_loop"], "mini_for_loop", "Use flavor mini_for_loop_sdpa."),
    ],
)
def test_the_flavor_that_would_train_exists(files, name, remedy, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(accelerator, "has_certainly_none", lambda: True)
    for file in files:
        (tmp_path / f"{file}.toml").write_text('inherits = "debugmodel"\nattention = "flex"\n')
    with pytest.raises(EzpzError) as error:
        early_refusals.refuse_attention(Job(name, path=tmp_path / "job.toml"), [])
    assert str(error.value).endswith(remedy.replace("FOLDER", str(tmp_path)))


@pytest.mark.parametrize(
    ("values", "flags", "said"),
    [
        # By hand: (16 bytes of ids and labels + 2 x 256 of an input) x 2**40 x 2048 tokens.
        ({"local_batch_size": 2**40}, [], "mine: training.local_batch_size .* 1,081,344 TiB"),
        ({"local_batch_size": 2**40, "seq_len": 1024}, [], "540,672 TiB"),
        ({}, ["--training.local-batch-size", f"{2**40}"], "mine and the command line: "),
        ({"local_batch_size": 2**40}, ["--training.local_batch_size=2"], None),
        ({}, [], None),
        # What a pipeline computes at once, and another model, only the host knows.
        ({"local_batch_size": 2**40}, ["--parallelism.pipeline_parallel_degree", "2"], None),
        ({"local_batch_size": 2**40}, ["--override.imports", "x"], None),
    ],
)
def test_a_batch_that_no_machine_can_hold_is_refused_early(values, flags, said) -> None:
    values = {f"training.{key}": value for key, value in values.items()}
    job = Job("debugmodel_sdpa", path=Path("mine"), values=values)
    with pytest.raises(EzpzError, match=said) if said else contextlib.nullcontext():
        early_refusals.refuse_sizes(job, flags)


@pytest.mark.parametrize(
    ("flavor", "degree", "said"),
    [
        ("debugmodel_sdpa", "3", "= 3 does not divide the 8 experts .* that do: 2 and 4"),
        ("gpt_oss_20b", "3", "= 3 does not divide the 32 experts"),  # the host's own model
        ("pr_moe_4B_like", "64", "does not divide the 32 experts .* in layer 1 and"),
        ("debugmodel_sdpa", "4", None),
        ("debugmodel_sdpa", "1", None),
    ],
)
def test_a_degree_that_does_not_divide_the_experts_is_refused_early(flavor, degree, said) -> None:
    job = Job(flavor, path=Path("mine"))
    with pytest.raises(EzpzError, match=said) if said else contextlib.nullcontext():
        early_refusals.refuse_sizes(job, ["--parallelism.expert-parallel-degree", degree])


@pytest.mark.parametrize(
    ("values", "flags", "said"),
    [
        (
            {"total_steps": 50, "warmup_steps": 60},
            ["--training.steps", "51"],
            "50 is less than .* = 51: ",
        ),
        ({"total_steps": 50}, [], "training.steps = 10000"),  # the host's own number
        (
            {},
            ["--lr_scheduler.total_steps=50"],
            "mine and the command line: lr_sch.* after step 51",
        ),
        ({"total_steps": 50}, ["--training.steps", "50"], None),
        ({"total_steps": 50}, ["--lr-scheduler.total-steps", "None"], None),
        # The host shortens the warm-up, and says so.
        ({"warmup_steps": 60}, ["--training.steps", "50"], None),
    ],
)
def test_a_run_that_is_longer_than_its_schedule_is_refused_early(values, flags, said) -> None:
    values = {f"lr_scheduler.{key}": value for key, value in values.items()}
    job = Job("debugmodel_sdpa", path=Path("mine"), values=values)
    with pytest.raises(EzpzError, match=said) if said else contextlib.nullcontext():
        early_refusals.refuse_sizes(job, flags)


VERSION = "cuda: Optional[str] = {}\nhip: Optional[str] = {}\nxpu: Optional[str] = {}\n"


@pytest.mark.parametrize(
    ("built_for", "has_driver", "expected"),
    [
        (("None", "None", "None"), True, True),
        (("'13.0'", "None", "None"), False, True),
        (("'13.0'", "None", "None"), True, False),
    ],
)
def test_a_machine_that_has_certainly_no_accelerator(
    built_for, has_driver, expected, monkeypatch, tmp_path
) -> None:
    (tmp_path / "version.py").write_text(VERSION.format(*built_for))
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(accelerator.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(accelerator.platform, "system", lambda: "Linux")
    monkeypatch.setattr(accelerator, "_has_cuda_driver", lambda: has_driver)
    assert accelerator.has_certainly_none() is expected
    (tmp_path / "version.py").write_text("__version__ = '9'\n")
    assert accelerator.has_certainly_none() is False, "it says nothing: torch has to be asked"


JOBS = {
    "a flavor": "",
    "settings": """
[job]
description = "no setting"
dump_folder = "there"
[training]
steps = 7
[optimizer]
lr = 0.5
beta1 = 0.8
[activation_checkpoint]
mode = "none"
[validation]
enable = true
steps = 3
""",
    "another mode of activation checkpointing": """
[activation_checkpoint]
mode = "full"
""",
    "a text of the host's": '[training]\ndataset = "c4"\n',
}


@pytest.mark.parametrize("text", JOBS.values(), ids=JOBS)
def test_the_settings_at_hand_are_those_of_the_host(text: str, tmp_path) -> None:
    check_host()
    file = tmp_path / "job.toml"
    file.write_text(f'[model]\nname = "ezpz_moe"\nflavor = "debugmodel_sdpa_for_loop"\n{text}')
    job = load_job(file)
    at_hand = settings_at_hand(job, load_flavor(job.flavor))
    if at_hand is None:
        pytest.skip("this host's settings are not shipped")
    with as_on_an_accelerator():  # they do not depend on this machine
        asked = [each for each in host().settings(host().trainer_config(job)) if each.changed]
    assert asked == at_hand


def test_what_telemetry_sets_is_left_to_the_host(tmp_path) -> None:
    (tmp_path / "mine.toml").write_text('inherits = "debugmodel"\n[telemetry]\nevery = 4\n')
    assert settings_at_hand(Job("mine"), load_flavor("mine", near=tmp_path)) is None


# --- the trainer's flags ----------------------------------------------------------------------

FLAGS = [
    HostFlag("training.steps", "INT", "10", ""),
    HostFlag("training.dtype", "{bfloat16,float32}", "float32", ""),
    HostFlag("training.max_norm", "FLOAT|INT", "1.0", ""),
    HostFlag("debug.seed", "{None}|INT", "None", ""),
    HostFlag("checkpoint.enable", "", "False", ""),
    HostFlag("checkpoint.load_step", "INT", "-1", ""),
    HostFlag("checkpoint.enable_first_step_checkpoint", "", "False", ""),
    HostFlag("override.imports", "TARGET ...", "", "", many=True),
    HostFlag("ac:full", "", "", "", is_subcommand=True),
    HostFlag("ac.debug", "", "False", "", after="ac:full"),
]
OURS = ["--nproc", "--nnodes"]


@pytest.fixture
def refused(monkeypatch):
    """The message for a command line; empty if it is not refused."""
    monkeypatch.setattr(trainer_flags, "facts", lambda: releases.Facts(FLAGS, {}))

    def message(line: str) -> str:
        try:
            trainer_flags.refuse_wrong_flags(line.split(), OURS)
        except EzpzError as error:
            return str(error)
        return ""

    return message


@pytest.mark.parametrize(
    "line",
    [
        "--training.steps 5",
        "--training.steps=5 --checkpoint.enable --checkpoint.no-enable",
        "--checkpoint.load-step -1 --training.max_norm -1.5e3",
        "--debug.seed None --training.dtype bfloat16",
        "--override.imports a=b c --debug.seed 3",
        "--debug.seed 3 ac:full --ac.debug --ac.no-debug",
    ],
)
def test_what_the_host_takes_is_not_refused(line: str, refused) -> None:
    assert refused(line) == ""


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--training.step 5", ["--training.step:", "Did you mean '--training.steps'?"]),
        ("--nprocs 2", ["--nprocs:", "Did you mean '--nproc'?"]),
        ("--steps 5", ["Did you mean '--training.steps'?"]),
        (
            "--checkpoint.enable_checkpoint",
            ["--checkpoint.enable_checkpoint:", "now --checkpoint.enable."],
        ),
        ("--checkpoint.no-enable-checkpoint", ["now --checkpoint.no-enable."]),
        ("--training.seed 3", ["now --debug.seed."]),
        ("--checkpoint.interval_type steps", ["in steps, not in seconds."]),
        ("--checkpoint.no-enabel", ["Did you mean '--checkpoint.no-enable'?"]),
        ("--training.no-steps 5", ["--training.no-steps: neither"]),
        ("--training.steps five", ["--training.steps five: must be an integer."]),
        ("--training.steps", ["--training.steps: needs a value, an integer."]),
        ("--training.steps --debug.seed 3", ["--training.steps: needs a value"]),
        ("--training.steps 1.5", ["1.5: must be an integer."]),
        ("--training.dtype bf16", ["must be one of bfloat16, float32."]),
        ("--debug.seed nine", ["--debug.seed nine: must be None or an integer."]),
        ("--training.steps 3 4", ["4 after --training.steps: the trainer takes no such word."]),
        ("--checkpoint.enable true", ["--checkpoint.enable: takes no value", "no-enable."]),
        ("extra", ["extra: the trainer takes no such word."]),
        ("ac:ful", ["Did you mean 'ac:full'?"]),
        ("--ac.debug", ["--ac.debug: write it after one of ac:full."]),
        ("ac:full --training.steps 3", ["--training.steps: write it before ac:full"]),
        ("--a.b 1 --c.d 2", ["2 wrong flags\n  --a.b: ", "\n  --c.d: "]),
        ("--\x1b[31m" + "x" * 999, ["..."]),
    ],
)
def test_what_the_host_would_refuse(line: str, parts: list[str], refused) -> None:
    message = refused(line)
    assert all(part in message for part in parts), message
    assert "\x1b" not in message
    assert max(map(len, message.splitlines())) < 250


@pytest.mark.parametrize(
    "line",
    ["--training.steps-per-epoch 5", "--debug.enable", "--checkpoint.enable-step", "--bogus"],
)
def test_a_flag_that_may_do_the_opposite_is_not_proposed(line: str, refused) -> None:
    assert "Did you mean" not in refused(line)


OLDER = {key: older for key, older in OLDER_KEYS.items() if key not in keys_by_spelling()}
RELEASES = {"0.2.2": Titan02, "0.3.0": Titan03}


@pytest.mark.parametrize("release", RELEASES)
def test_an_older_flag_is_told_its_successor_or_why_there_is_none(release, monkeypatch) -> None:
    shipped = json.loads((releases.FOLDER / f"{release}.json").read_text())
    flags = [HostFlag(**flag) for flag in shipped["flags"]]
    monkeypatch.setattr(trainer_flags, "facts", lambda: releases.Facts(flags, {}))
    for module in (trainer_flags, flag_remedies):
        monkeypatch.setattr(module, "presumed_host", RELEASES[release])
    assert len(OLDER) > 50
    for key, older in OLDER.items():
        with pytest.raises(EzpzError) as error:
            trainer_flags.refuse_wrong_flags([f"--{key}"], [])
        said = str(error.value)
        section, _, name = older.now.rpartition(".")
        row = RELEASES[release]().job_keys().get(section, {}).get(name)
        if now := re.search(r" now (--[\w.-]+\w)", said):
            switches = {flag.option.replace(".", ".no-") for flag in flags if not flag.type}
            assert now[1] in {*switches, *(flag.option for flag in flags)}, said
        else:
            assert (row.message if row else older.note).rstrip(".") in said, said
