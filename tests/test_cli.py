"""``ezpz-moe``: what every command prints, its exit codes, and that mistakes get one message."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tomli
import tyro
from contract_cases import ON_THE_CPU

from ezpz_moe import __version__, cli
from ezpz_moe.cli import display
from ezpz_moe.cli.mistakes import in_one_line, options
from ezpz_moe.cli.signature import actions_of, arguments_of
from ezpz_moe.compute import for_loop, get_backend
from ezpz_moe.compute.backends.for_loop import ForLoop
from ezpz_moe.compute.names import known_backend_names
from ezpz_moe.config.flavors import flavor_names
from ezpz_moe.errors import DEBUG_VARIABLE, EzpzError
from ezpz_moe.tools import launch, verify
from ezpz_moe.tools.nodes import Placement
from ezpz_moe.tools.verify import ROUTINGS, TOKEN_ROUTINGS

JOB = Path(__file__).parent.parent / "flavors" / "jobs" / "debug_cpu.toml"


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command changes for its process is for its process only."""
    monkeypatch.setenv(DEBUG_VARIABLE, "0")
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)


def table(output: str) -> dict[str, list[str]]:
    """The lines of a table without its frame: first cell -> the other words."""
    lines = (line.split() for line in output.splitlines())
    return {words[0]: words[1:] for words in lines if words}


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    return stopped.value.code


def test_the_installed_command_is_this_one() -> None:
    (script,) = entry_points(group="console_scripts", name="ezpz-moe")
    assert script.load() is cli.main


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--debug", "--version"], ["train", "job.toml", "--version"]]
)
def test_version(arguments: list[str], capsys) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"ezpz-moe {__version__}\n"


def test_an_interrupt_ends_a_command_without_a_traceback(monkeypatch, capsys) -> None:
    def interrupted(check):
        raise KeyboardInterrupt

    monkeypatch.setattr("ezpz_moe.tools.verify.compare", interrupted)
    assert cli.main(["verify", "--device", "cpu"]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "ezpz-moe: stopped by SIGINT\n"


@pytest.mark.parametrize("command", [[], ["train"], ["verify"], ["upcycle"], ["analyze"]])
def test_help_needs_no_torch(command: list[str]) -> None:
    program = (
        "import sys\nfrom ezpz_moe.cli import main\n"
        f"try: main([*{command!r}, '--help'])\n"
        "except SystemExit as stop: print(stop.code, {'torch', 'torchtitan'} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.startswith("usage: ezpz-moe")
    assert output.splitlines()[-1] == "0 set()"


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"]])
def test_a_reader_who_has_read_enough_causes_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ezpz_moe.cli", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


MADE_UP = '''
from dataclasses import dataclass

from tyro.conf import Suppress

from ezpz_moe.cli import display
from ezpz_moe.cli.command import Reporting


@dataclass(frozen=True)
class Echo(Reporting):
    """Repeat the trainer's flags."""

    group = "models"

    word: str = "said"
    """What goes before them."""
    host_flags: Suppress[tuple[str, ...]] = ()

    def run(self) -> int:
        said = {self.word: list(self.host_flags)}
        display.print_json(said)
        display.print_line(str(said))
        return 7


COMMAND = Echo
'''


def test_a_command_is_one_file(tmp_path, monkeypatch, capsys) -> None:
    """A file that nothing else knows of, as if it lay in the folder of the commands."""
    (tmp_path / "echo.py").write_text(MADE_UP)
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert list(cli.commands())[:4] == ["describe", "flavors", "show", "echo"], "by group"
        assert cli.main(["echo", "--word", "told", "--json", "--training.steps", "2"]) == 7
        assert json.loads(capsys.readouterr().out) == {"told": ["--training.steps", "2"]}
        assert exit_code("--help") == 0
        assert "Repeat the trainer's flags." in capsys.readouterr().out
    finally:
        del sys.modules["ezpz_moe.cli.echo"], cli.echo


@pytest.mark.parametrize(
    "names",
    [
        ["debugmodel", "16B"],
        pytest.param(flavor_names(), marks=pytest.mark.full, id="all"),
    ],
)
def test_flavors_lists_all_with_their_figures(capsys, monkeypatch, names: list[str]) -> None:
    monkeypatch.setattr("ezpz_moe.config.flavors.flavor_names", lambda: names)
    assert cli.main(["flavors"]) == 0
    captured = capsys.readouterr()
    rows = table(captured.out)
    assert set(names) <= set(rows)
    assert " ".join(rows["16B"]) == "16.34 B 3.29 B 64 6 1408 27 2048 flex grouped_mm"
    assert "BACKEND: " + ", ".join(known_backend_names()) in captured.out
    assert captured.err == ""


def test_show_a_job(capsys) -> None:
    assert cli.main(["show", str(JOB)]) == 0
    captured = capsys.readouterr()
    rows = table(captured.out)
    assert rows["compute_backend"] == ["for_loop"]
    assert rows["dimensions.num_experts"] == ["8"]
    said = tomli.loads(JOB.read_text())
    assert rows["training.steps"] == [str(said["training"]["steps"]), "10000"]
    assert rows["optimizer.param_groups.0.optimizer_kwargs.lr"] == [
        str(said["optimizer"]["lr"]),
        "-",
    ]
    assert "training.gc_freq" not in rows, "the host's default is not shown"
    assert not {"origin", "checked", "model_spec"} & set(rows), "our own fields are no settings"
    assert captured.err == ""


@pytest.mark.parametrize(
    "flags", [["--world-size", "0"], ["--nproc", "-3"], ["--nproc", "2", "--world-size", "3"]]
)
def test_show_takes_the_ranks_of_train_but_no_impossible_ones(capsys, flags) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["show", str(JOB), *flags])
    assert end.value.code == 2
    assert " ".join(flags[-2:]) in capsys.readouterr().err


def test_what_follows_train_may_follow_the_commands_that_look_at_a_run() -> None:
    """Each flag of `train` is one of theirs, but for those that are about starting."""
    known = cli.commands()
    of_train = set(options(known["train"])) - {"--dry-run", "--help-trainer"}
    for command in ("show", "doctor", "describe", "preflight"):
        assert of_train <= set(options(known[command])), command
    place = ["--nproc", "2", "--nnodes", "3", "--node-rank", "1", "--master-addr", "node0"]
    assert cli.main(["show", str(JOB), *place, "--resume-from-last-whole"]) == 0


def test_a_title_keeps_its_brackets(capsys) -> None:
    row = {"a": "[red]b, in a row that is wider than the title"}
    display.print_table([row], title="runs/[bold]x.toml")
    printed = capsys.readouterr().out
    assert "runs/[bold]x.toml" in printed
    assert "[red]b" in printed


def test_show_all_of_a_flavor(capsys) -> None:
    assert cli.main(["show", "16B_sdpa", "--all"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["name"] == ["16B_sdpa"]
    assert rows["dimensions.dim"] == ["2048"]
    assert rows["counted.total"] == ["16336154112"]
    assert rows["training.gc_freq"] == ["50", "50"]


def test_a_real_process_is_quiet_beside_its_result() -> None:
    """pytest takes logging over, so that only a process of its own shows what a person sees."""
    command = [sys.executable, "-m", "ezpz_moe.cli", "show", "debugmodel"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "counted.total" in done.stdout
    # On a slow machine a line of progress may be due.
    assert [line for line in done.stderr.splitlines() if ", after " not in line] == []


def test_backends_that_run_here(capsys) -> None:
    assert cli.main(["backends", "--device", "cpu", "--dtype", "float64"]) == 0
    output = capsys.readouterr().out
    rows = table(output)
    assert rows["for_loop"][:4] == ["yes", "yes", "no", "no"]
    assert rows["grouped_mm"][:4] == ["no", "no", "yes", "no"]
    assert "grouped_mm: torch._grouped_mm of torch" in output
    assert "use for_loop or batched_mm_padded" in output
    assert "\x1b" not in output
    assert get_backend("batched_mm_padded").summary in output, "nothing is cut when piped"


def test_backends_tells_every_reason(capsys) -> None:
    assert cli.main(["backends", "--device", "hpu"]) == 0
    output = capsys.readouterr().out
    for name in known_backend_names():
        assert f"\n{name}: this machine has no usable hpu device" in output


def test_verify_passes(capsys) -> None:
    dtypes = ["--dtype", "float32", "float64"]
    assert cli.main(["verify", "--device", "cpu", *dtypes, "--activation", "relu2"]) == 0
    captured = capsys.readouterr()
    without_float64 = ("grouped_mm", "grouped_mm_fused")
    in_float64 = [name for name in ON_THE_CPU if name not in without_float64]
    cases = len(ROUTINGS) + len(TOKEN_ROUTINGS)
    assert captured.out.count(" ok ") == cases * (len(ON_THE_CPU) + len(in_float64))
    reasons = [line for line in captured.out.splitlines() if re.match(r"\w+: ", line)]
    assert len(set(reasons)) == len(reasons), "each once, and not for each dtype"
    of_one_dtype = [line for line in reasons if line.startswith("grouped_mm: torch._grouped_mm")]
    assert [line.endswith(" (float64)") for line in of_one_dtype] == [True]
    assert any(line.startswith("npu: ") and not line.endswith(")") for line in reasons)
    assert captured.err == ""


def test_verify_as_json(capsys) -> None:
    assert cli.main(["verify", "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    usable = [name for name, against in report["not_usable"]["float32"].items() if not against]
    assert usable == ON_THE_CPU
    tensors = 5 * len(ROUTINGS) + 6 * len(TOKEN_ROUTINGS)
    # Three more with a gate and one more without, and of each two or three biases.
    others = 3 * 5 + 2 * 4
    biased = 4 * 8 + 2 * 6
    tensors += others + biased + (others + 5) + (biased + 6)
    assert len(report["rows"]) == tensors * len(usable)
    assert {row["verdict"] for row in report["rows"]} == {"ok"}


def _drops_the_last_token(w1, w2, w3, x, counts):
    y = for_loop(w1, w2, w3, x, counts).clone()
    y[counts.sum() - 1 : counts.sum()] = float("nan")
    return y


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_fails(as_json: bool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ForLoop, "ffn", staticmethod(_drops_the_last_token))
    checks = verify.plan("cpu", ["float32"])
    swiglu = [each for each in checks if (each.ffn, each.entry) == ("swiglu", "ffn")]
    monkeypatch.setattr(verify, "plan", lambda *_: swiglu)
    arguments = ["verify", "--device", "cpu", "--dtype", "float32"]
    assert cli.main([*arguments, "--json"] if as_json else arguments) == 1
    output = capsys.readouterr().out
    if as_json:
        report = json.loads(output)
        assert report["passed"] is False
        wrong = [row for row in report["rows"] if row["verdict"] != "ok"]
        assert {row["backend"] for row in wrong} == {"for_loop"}
        assert wrong[0]["relative_error"] is None
    else:
        assert "FAILED for_loop float32 ffn 'tail' swiglu y: beyond the bound" in output


def test_train_hands_the_rest_to_the_host(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(launch, "train", lambda *args, **kw: calls.append((args, kw)) or 7)
    flags = ["--training.steps", "5", "--debug.seed", "3", "--override.imports", 'a={"b": 1}']
    assert cli.main(["train", "job.toml", *flags[:4], "--nproc", "2", *flags[4:]]) == 7
    ((arguments, keywords),) = calls
    assert arguments == ("job.toml", flags)
    assert keywords == {
        "nproc": 2,
        "placement": None,
        "from_last_whole": False,
        "tell": display.print_to_stderr,
    }
    assert os.environ[DEBUG_VARIABLE] == "0", "--debug.seed is the host's, not our --debug"


def test_train_hands_on_the_machines_place(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(launch, "train", lambda *args, **kw: calls.append(kw) or 0)
    where = ["--nnodes", "4", "--node-rank", "3", "--master-addr", "node0", "--master-port", "7"]
    assert cli.main(["train", "job.toml", *where, "--resume-from-last-whole"]) == 0
    (call,) = calls
    assert call["placement"] == Placement(4, 3, "node0", 7)
    assert (call["nproc"], call["from_last_whole"]) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["show", "16b_sdap"], ["'16b_sdap'", "16B_sdpa"]),
        (["show", "no/such.toml"], ["no/such.toml"]),
        (["train", "no/such.toml"], ["no/such.toml"]),
        (["train", "16B_spda"], ["'16B_spda'", "16B_sdpa"]),
        (["train", "debugmodel", "--nproc", "0"], ["--nproc 0"]),
        (["verify", "--device", "abacus"], ["'abacus'"]),
        (["verify", "--device", "meta"], ["'meta'"]),
        (["verify", "--device", "hpu"], ["no backend can run on hpu", "for_loop"]),
        (["verify", "--dtype"], ["--dtype", "bfloat16"]),
        (["backends", "--device", "cpu:x"], ["'cpu:x'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_users_mistake_gets_one_message(arguments: list[str], parts: list[str], capsys) -> None:
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ezpz-moe: error: ")
    assert [part for part in parts if part not in captured.err] == []
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["name a command: describe, ", "ezpz-moe --help"]),
        (["bogus"], ["there is no command bogus.", "ezpz-moe --help"]),
        (["backnds", "--help"], ["there is no command backnds.", "Did you mean 'backends'?"]),
        (["help"], ["Did you mean ezpz-moe --help?"]),
        (["my/job.toml"], ["Did you mean ezpz-moe train my/job.toml?"]),
        (["train", "--config", "my/job.toml"], ["without --config: ezpz-moe train FLAVOR|JOB"]),
        (["ckpt", "inspect", __file__], ["test_cli.py: is a file. Name a checkpoint's folder"]),
        (["--versoin"], ["there is no option --versoin.", "'--version'"]),
        (["--devcie", "cpu", "backends"], ["there is no option --devcie."]),
        (["backends", "--devcie", "cpu"], ["backends: there is no option --devcie.", "'--device'"]),
        (["plot", "--ouut", "x"], ["plot: there is no option --ouut.", "'--out'"]),
        (["backends", "--bogus"], ["there is no option --bogus. See"]),
        (["generate", "x", "--prompt", "-- hello"], ["x: there is no such folder"]),
        (["backends", "--verbsoe"], ["no option --verbsoe.", "'--verbose'"]),
        (["backends", "--a\x1b" + 100 * "b"], ["no option --a\\x1bbb", "..."]),
        (["flavors", "--training.steps", "5"], ["flavors: there is no option --training.steps."]),
        (["flavors", "more"], ["flavors: has no place for more.", "ezpz-moe flavors --help"]),
        (["ckpt", "inspct", "x"], ["ckpt: there is no inspct.", "'inspect'", "remap"]),
        (["ckpt", "inspect", "x", "--jsno"], ["ckpt: there is no option --jsno.", "'--json'"]),
        (["analyze", "x", "--data", "y", "--json", "f.json"], ["has no place for f.json", "--out"]),
        (["--quiet", "verify", "--verbose"], ["--quiet, --verbose: choose one"]),
        (["completion", "--install"], ["SHELL is 'ksh'", "bash | zsh | fish"]),
        (["ckpt"], ["ckpt: name one of inspect, remap, prune."]),
        (
            ["upcycle", "x"],
            ["upcycle: FLAVOR|JOB.toml and OUT are missing.", "DENSE... FLAVOR|JOB"],
        ),
        (["analyze", "x"], ["--data FILE, or --attribute FILE: the text is missing."]),
        (
            ["--debug", "ckpt", "remap", "x"],
            ["ckpt remap: DST and --to are missing.", "SRC DST --"],
        ),
        (["tune", "--training.steps", "5"], ["tune: FLAVOR|JOB.toml is missing."]),
        (["new", "x", "--device"], ["new: --device: needs a value, one of any, cpu, "]),
        (["analyze", "x", "--data"], ["analyze: --data: needs a value, FILE."]),
        (["new", "x", "--device", "gpu"], ["--device gpu: must be one of any, cpu, ", "npu. See"]),
        (["new", "x", "--device=cdua"], ["--device cdua: must be one of", "Did you mean 'cuda'?"]),
        (["verify", "--dtype", "float32", "int8"], ["--dtype int8: must be one of bfloat16, "]),
        (["ckpt", "remap", "a", "b", "--to", "hff"], ["remap: --to hff: must", "mean 'hf'?"]),
        (["completion", "zish"], ["completion: zish: must be one of auto, bash, zsh, fish."]),
        (["bench", "--repeats", "x"], ["bench: --repeats x: must be an integer."]),
        (["generate", "x", "--top_p", "most"], ["--top_p most: must be a number."]),
        (["train", "job.toml", "--nproc", "two"], ["train: --nproc two: must be an integer."]),
        (
            ["train", "j", "--nproc", "--training.steps", "5"],
            ["--nproc: needs a value, an integer"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_in_the_words_is_one_line(
    arguments: list[str], parts: list[str], capsys, monkeypatch
) -> None:
    monkeypatch.setenv("SHELL", "/bin/ksh")
    assert exit_code(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ezpz-moe: error: ")
    assert captured.err.count("\n") == 1
    assert [part for part in parts if part not in captured.err] == []
    assert captured.out == ""


def _lines_without_arguments() -> Iterator[tuple[list[str], type]]:
    for name, command in cli.commands().items():
        yield [name], command
        for action, class_ in actions_of(command):
            yield [name, action], class_


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words))
        for words, command in _lines_without_arguments()
        if any(each.default is MISSING for each in fields(command))
        and not any(actions_of(command))  # it says their names
    ],
)
def test_every_command_says_in_one_line_what_it_needs(words: list[str], capsys) -> None:
    assert exit_code(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"ezpz-moe: error: {' '.join(words)}: ")
    assert said.count("\n") == 1
    # Only `convert` takes one file or two, which it checks itself.
    needs = f"missing. Write ezpz-moe {' '.join(words)} "
    assert ("takes a job" if words == ["convert"] else needs) in said


@pytest.mark.parametrize(
    "words",
    [
        words
        for words, command in _lines_without_arguments()
        if any(each.positional and each.many for each in arguments_of(command))
    ],
)
def test_no_help_shows_an_empty_default(words: list[str], capsys) -> None:
    assert exit_code(*words, "--help") == 0
    assert "(default: )" not in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_else_tyro_refuses_is_one_line(monkeypatch, capsys, encoding) -> None:
    # tyro draws its box otherwise where stdout is not UTF-8.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    @dataclass(frozen=True)
    class Dear:
        price: int = 3

        def __post_init__(self) -> None:
            raise ValueError(f"{self.price} is too much")

    with pytest.raises(EzpzError) as refused, in_one_line(["dear"], "dear", Dear):
        tyro.cli(Dear, args=[])
    said = "dear: Error parsing Dear: 3 is too much. See ezpz-moe dear --help."
    assert str(refused.value) == said
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--debug", "show", "nope"], ["show", "nope", "--debug"]])
def test_debug_shows_where_a_mistake_was_found(arguments: list[str]) -> None:
    with pytest.raises(EzpzError, match="nope"):
        cli.main(arguments)
    assert os.environ[DEBUG_VARIABLE] == "1"


def test_json_is_alone_on_stdout(capsys) -> None:
    assert cli.main(["--quiet", "backends", "--device", "hpu", "--json"]) == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert (said["device"], said["dtype"]) == ("hpu", "bfloat16")
    assert [each["name"] for each in said["backends"]] == list(known_backend_names())
    assert not any(each["usable"] for each in said["backends"])
    assert all("no usable hpu device" in each["reasons"][0] for each in said["backends"])
    assert captured.err == ""


@pytest.mark.parametrize("flag", ["--quiet", "--verbose"])
@pytest.mark.parametrize("comes_first", [True, False])
def test_how_much_is_said_holds_before_and_after_the_command(
    flag: str, comes_first: bool, monkeypatch
) -> None:
    modes = []
    monkeypatch.setattr(launch, "train", lambda *args, **kw: modes.append(display._mode) or 0)
    command = ["train", "job.toml"]
    assert cli.main([flag, *command] if comes_first else [*command, flag]) == 0
    assert [(mode.quiet, mode.verbose) for mode in modes] == [
        (flag == "--quiet", flag != "--quiet")
    ]


def test_the_hosts_log_is_shown_to_whoever_asks() -> None:
    program = "import logging; from ezpz_moe.cli import display; display.set_mode(verbose={}); "
    program += "display.set_log_level(); logging.getLogger().info('a remark')"
    for verbose, shown in ((True, True), (False, False)):
        command = [sys.executable, "-c", program.format(verbose)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ("a remark" in done.stderr) is shown


# --- completion -----------------------------------------------------------------------------------

COMPLETE = """
source {script}
complete_words() {{
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _ezpz_moe
  echo "${{#COMPREPLY[@]}} ${{COMPREPLY[*]}}"
}}
complete -p ezpz-moe
complete_words ezpz-moe doc
complete_words ezpz-moe train --npr
complete_words ezpz-moe verify --dtype f
complete_words ezpz-moe train jo
"""


def test_bash_completes_commands_options_and_values(tmp_path, capsys) -> None:
    assert cli.main(["completion", "bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    command = ["bash", "-c", COMPLETE.format(script=script)]
    said = subprocess.check_output(command, text=True).splitlines()
    # bash completes files where it gets no word.
    assert "-o default" in said[0]
    assert said[1:] == ["1 doctor", "1 --nproc", "3 float32 float16 float64", "0 "]


@pytest.mark.parametrize(
    ("shell", "file", "settings"),
    [
        ("bash", "data/ezpz_moe/completion/ezpz-moe.bash", ".bashrc"),
        ("zsh", "data/ezpz_moe/completion/_ezpz-moe", ".zshrc"),
        ("fish", "config/fish/completions/ezpz-moe.fish", None),
    ],
)
def test_a_completion_is_installed_once(
    shell: str, file: str, settings: str | None, tmp_path, monkeypatch, capsys
) -> None:
    for name, value in {"HOME": "", "XDG_DATA_HOME": "data", "XDG_CONFIG_HOME": "config"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.delenv("ZDOTDIR", raising=False)
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    if settings:
        (tmp_path / settings).write_text("alias a=b")  # without an end of line
    for _ in range(2):
        assert cli.main(["completion", "--install"]) == 0
    assert f"{tmp_path / file} written" in capsys.readouterr().out
    assert "_tyro_ezpz_moe" in (tmp_path / file).read_text()
    if settings:
        kept, added = (tmp_path / settings).read_text().splitlines()
        assert kept == "alias a=b"
        assert str((tmp_path / file).parent) in added


def test_a_completion_that_cannot_be_installed_is_said(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert exit_code("completion", "fish", "--install") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
