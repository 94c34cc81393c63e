"""``ezpz-moe new``: what it writes passes doctor, as written and with its lines switched on."""

from __future__ import annotations

import errno
import gzip
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pyarrow
import pytest
from pyarrow import parquet

from ezpz_moe import cli
from ezpz_moe.config.job import load_job as read_job
from ezpz_moe.config.toml import read_toml
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import documents, our_texts
from ezpz_moe.hosts.detect import HOSTS
from ezpz_moe.hosts.jobs import load_job
from ezpz_moe.tools import new_job as module
from ezpz_moe.tools.new_job import Device, new_job

README = Path(__file__).parent.parent / "README.md"
DEVICES = get_args(Device)
OFF = re.compile(r"#(?=[\w\[])")
# Sizes of ours and the host's own models, one that no size is known of, a backend in the name.
FLAVORS = (
    "debugmodel",
    "16B",
    "qwen3_30B_A3B",
    "gpt_oss_debugmodel",
    "10B_2B_batched_mm_padded",
    "671B",
)


def write(folder: Path, flavor: str = "debugmodel", device: Device = "any", data=None) -> Path:
    return new_job(folder / "my" / "job.toml", flavor, device, data).path


def switched_on(text: str, *numbers: int) -> str:
    """The text with these lines on; all if none are named."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if not numbers or number in numbers:
            lines[number] = OFF.sub("", line, count=1) if OFF.match(line) else line
    return "".join(lines)


def settings(text: str) -> list[tuple[int, ...]]:
    """The lines that can be switched on, each with a header above it that is off."""
    found, header = [], ()
    for number, line in enumerate(text.splitlines()):
        if re.match(r"#?\[", line):
            header = (number,) if line.startswith("#") else ()
        elif OFF.match(line):
            found.append((*header, number))
    return found


def test_the_readmes_tasks_follow_from_one_another(tmp_path) -> None:
    """With its lines switched on, the job makes the checkpoint and records that they need."""
    tasks = " ".join(README.read_text().partition("## Five tasks")[2].split())
    (switching,) = re.findall(r"In the file, (.*?)\. Then", tasks)
    path = write(tmp_path)
    text = path.read_text()
    for name in re.findall("`([^`]+)`", switching):
        text = text.replace(f"\n#{name}", f"\n{name}", 1)
    path.write_text(text)
    values = load_job(path).values
    assert values["checkpoint.enable"]
    assert values["telemetry.detail"]
    assert f"`ezpz-moe plot {Path(values['job.dump_folder'])}`" in tasks
    for command in ("new", "doctor", "train", "generate"):
        assert f"`ezpz-moe {command} {path.relative_to(tmp_path)}" in tasks


def assert_ready(path: Path, device: Device) -> None:
    from ezpz_moe.tools import doctor

    found = doctor.job_findings(doctor.Asked(str(path)))
    problems = [each.problem for each in found if not each.holds]
    if device == "cuda":  # doctor speaks of this machine, which may have no GPU
        problems = [each for each in problems if "has no backward on the CPU" not in each]
    assert problems == []
    assert len(found) > 2


@pytest.mark.parametrize(
    ("device", "flavor"), list(zip(DEVICES, FLAVORS, strict=True)), ids=map(str, FLAVORS)
)
def test_doctor_passes_what_is_written(tmp_path, device, flavor) -> None:
    path = write(tmp_path, flavor, device)
    assert_ready(path, device)
    path.write_text(switched_on(path.read_text()))
    assert_ready(path, device)


@pytest.mark.parametrize(("flavor", "device"), [("debugmodel", "any"), ("16B", "cuda")])
def test_doctor_passes_each_line_that_is_switched_on(tmp_path, flavor, device) -> None:
    path = write(tmp_path, flavor, device)
    text, plain = path.read_text(), read_toml(path)
    lines = settings(text)
    assert len(lines) >= 12
    for numbers in lines:
        path.write_text(switched_on(text, *numbers))
        assert read_toml(path) != plain
        assert_ready(path, device)


def test_checkpoints_wandb_and_telemetry_can_be_switched_on(tmp_path) -> None:
    path = write(tmp_path)
    path.write_text(switched_on(path.read_text()))
    job = read_toml(path)
    assert job["checkpoint"]["enable"] is True
    assert job["metrics"]["enable_wandb"] is True
    assert job["telemetry"] == {"detail": "per_layer"}


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.generation)
def test_every_generation_reads_it(tmp_path, monkeypatch, host) -> None:
    monkeypatch.setattr(module, "presumed_host", lambda: host)
    path = write(tmp_path)
    path.write_text(switched_on(path.read_text()))
    assert read_job(path, host.job_keys()).flavor == "debugmodel_sdpa_for_loop"
    assert ("telemetry" in read_toml(path)) == ("telemetry" in host.job_keys())


@pytest.mark.parametrize(
    ("asked", "device", "written"),
    [
        ("debugmodel", "any", "debugmodel_sdpa_for_loop"),
        ("16B", "cuda", "16B_flex_grouped_mm"),
        ("16B_sdpa", "cuda", "16B_sdpa_grouped_mm"),
        ("16B_auto", "xpu", "16B_sdpa_auto"),
        ("own", "cuda", "own_flex"),
        ("own_for_loop", "cuda", "own_flex_for_loop"),
        ("dense", "cpu", "dense_sdpa"),
    ],
)
def test_what_the_flavor_leaves_open_suits_the_device(tmp_path, asked, device, written) -> None:
    (tmp_path / "my").mkdir()
    own = 'inherits = "debugmodel"\ncompute_backend = "batched_mm_padded"\n'
    (tmp_path / "my" / "own.toml").write_text(own)
    (tmp_path / "my" / "dense.toml").write_text('dense_baseline_of = "debugmodel"\n')
    assert read_toml(write(tmp_path, asked, device))["model"]["flavor"] == written


def test_a_dense_models_job_offers_nothing_about_experts(tmp_path) -> None:
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "dense.toml").write_text('dense_baseline_of = "debugmodel"\n')
    texts = [
        new_job(tmp_path / "my" / f"job_{flavor}.toml", flavor, "any", None).path.read_text()
        for flavor in ("debugmodel", "dense")
    ]
    offered = ["#expert_parallel_degree", "#[telemetry]"]
    assert [[line in text for line in offered] for text in texts] == [[True] * 2, [False] * 2]


def test_the_text(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text('{"text": "a"}\n')
    path = new_job(Path("of_file.toml"), "debugmodel", "any", "text.jsonl").path
    assert read_toml(path)["training"]["dataset_path"] == str(tmp_path / "text.jsonl")
    path = new_job(Path("of_host.toml"), "debugmodel", "any", "c4").path
    assert read_toml(path)["training"]["dataset"] == "c4"


CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.generation)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_of_chats_is_trained_on_as_chats(tmp_path, monkeypatch, host, compressed) -> None:
    monkeypatch.setattr(module, "presumed_host", lambda: host)
    chats = tmp_path / ("chats.jsonl.gz" if compressed else "chats.jsonl")
    said = f"\n{CHAT}\n".encode()
    chats.write_bytes(gzip.compress(said) if compressed else said)
    if not host.trains_on_chats:
        with pytest.raises(EzpzError, match=f"chats.* with {host.name}. Write each chat as one te"):
            write(tmp_path, data=str(chats))
        return
    path = write(tmp_path, data=str(chats))
    values = read_job(path, host.job_keys()).values
    assert values["training.dataset"] == our_texts.CHAT_FILE
    assert values["training.dataset_path"] == str(chats)
    assert "hf_assets_path in [model]" in path.read_text()


def test_a_file_of_text_is_none_of_chats(tmp_path) -> None:
    (tmp_path / "text.jsonl").write_text('{"messages": [], "text": "a"}\n')
    path = write(tmp_path, data=str(tmp_path / "text.jsonl"))
    assert "dataset" not in read_toml(path)["training"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("gone.jsonl", "--data gone.jsonl: there is no such file."),
        ("gone.txt.bz2", "--data gone.txt.bz2: there is no such file."),
        ("c4_tset", "torchtitan has no such dataset. Did you mean 'c4_test'?"),
        ("c5", "has no such dataset. Known are c4, "),
        ("text_file", "has no such dataset. Known are c4, "),
        (".", "--data .: is a folder. Name one file."),
        ("table.csv", "--data table.csv: unknown kind of file. Known: .txt, "),
        ("a.parquet.gz", "--data a.parquet.gz: unknown kind of file."),
    ],
)
def test_a_text_that_doctor_would_refuse(tmp_path, monkeypatch, data, message) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("table.csv", "a.parquet.gz"):
        Path(name).write_text("a")
    with pytest.raises(EzpzError) as error:
        new_job(Path("job.toml"), "debugmodel", "any", data)
    assert message in str(error.value)
    assert not Path("job.toml").exists()


@pytest.mark.parametrize(
    ("name", "held", "message"),
    [
        ("empty.txt", b"", "contains no text."),
        ("latin.txt", b"caf\xe9 au lait", "is not UTF-8 text: byte 3"),
        ("cut.jsonl", b'{"text": "a"}\n{"text":', "is broken: line 2"),
        ("rows.jsonl", b"[1]\n" + CHAT.encode(), "line 1: a list, not an object"),
        ("chats.jsonl", f'{CHAT}\n{{"messages": []}}'.encode(), "line 2: has messages of nobody"),
        ("no_text.parquet", {"x": ["a"]}, "has no column 'text'; found: 'x'."),
        ("numbers.parquet", {"text": [1, 2]}, "must hold a string in every row, but it is int64"),
    ],
)
def test_a_text_that_no_run_could_read(tmp_path, name, held, message) -> None:
    file = tmp_path / name
    if isinstance(held, dict):
        parquet.write_table(pyarrow.table(held), file)
    else:
        file.write_bytes(held)
    with pytest.raises(EzpzError) as error:
        write(tmp_path, data=str(file))
    assert str(error.value).startswith(f"--data {file}: dataset_path = '{file}'")
    assert message in str(error.value)
    assert not (tmp_path / "my" / "job.toml").exists()


def test_every_kind_of_text_has_a_reader() -> None:
    assert tuple(documents._READERS) == our_texts.KINDS


@pytest.mark.parametrize("name", ['my "own" job', "$HOME", "a\u2028b", "it's"])
def test_a_name_that_a_shell_or_toml_would_read_differently(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.jsonl").write_text('{"text": "a"}\n')
    assert cli.main(["new", f"{name}.toml", "--data", f"{name}.jsonl"]) == 0
    job = load_job(Path(f"{name}.toml"))
    assert job.values["job.dump_folder"] == f"./outputs/{name}"
    assert job.values["training.dataset_path"] == str(tmp_path / f"{name}.jsonl")
    for text in (capsys.readouterr().out, Path(f"{name}.toml").read_text()):
        line = next(each for each in text.split("\n") if "ezpz-moe doctor " in each)
        assert shlex.split(line.lstrip("# "))[2] == f"{name}.toml"


@pytest.mark.parametrize("name", ["a\nb.toml", "a\udc80.toml"])
def test_a_name_that_no_toml_can_hold(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EzpzError, match="no TOML can hold this name"):
        new_job(Path(name), "debugmodel", "any", None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there.toml"], "there.toml: is there already, and nothing is overwritten."),
        (["there.toml/job.toml"], "there.toml/job.toml: cannot be written: "),
        (["job"], "job: a job's name ends in .toml"),
        (["job.toml", "--flavor", "debugmodle"], "Did you mean 'debugmodel'?"),
        (["job.toml", "--flavor", "16B_flex", "--device", "cpu"], "has no backward on a CPU"),
    ],
)
def test_mistakes_write_nothing(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.toml").write_text("mine")
    with pytest.raises(SystemExit) as end:
        cli.main(["new", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert Path("there.toml").read_text() == "mine"
    assert [each.name for each in tmp_path.iterdir()] == ["there.toml"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode):
        path.touch()
        return Full()

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(EzpzError, match="cannot be written: No space left on device"):
        module._write(tmp_path / "job.toml", "text")
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_to_type_next_and_needs_no_torch(tmp_path) -> None:
    program = (
        "import sys\nfrom ezpz_moe.cli import main\n"
        "main(['new', 'job.toml', '--flavor', '16B', '--device', 'cuda'])\n"
        "print({'torch', 'torchtitan', 'pyarrow'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program]
    said = subprocess.check_output(command, text=True, cwd=tmp_path).splitlines()
    assert said == [
        "job.toml written: 16B_flex_grouped_mm. Next:",
        "  ezpz-moe doctor job.toml --nproc 8",
        "  ezpz-moe train job.toml --nproc 8",
        "set()",
    ]
