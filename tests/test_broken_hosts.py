"""Hosts that an upstream sync broke: doctor ends with its report, the other commands in one line.

Some are broken in this process, one thing at a time; those that cannot be imported are files of
their own before the installed torchtitan.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ezpz_moe import cli, hosts
from ezpz_moe.errors import EzpzError
from ezpz_moe.hosts import cpu, detect
from ezpz_moe.hosts.detect import check_host
from ezpz_moe.hosts.reliance import Reliance, is_written

check_host()  # before torchtitan is imported: it chooses the device

from torchtitan.components import optimizer  # noqa: E402
from torchtitan.models import deepseek_v3  # noqa: E402

from ezpz_moe.hosts.titan import job, parameters  # noqa: E402

FLAVOR = "debugmodel_sdpa"


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch):
    """What a command changes for its process is for its process only."""
    monkeypatch.setattr(logging.getLogger(), "level", logging.getLogger().level)
    parameters._summarize.cache_clear()
    yield
    detect.host.cache_clear()


def doctor(capsys, *arguments: str) -> str:
    """What it says of something broken, with single spaces."""
    assert cli.main(["doctor", "--all", *arguments]) == 1
    return " ".join(capsys.readouterr().out.split())


def refusal(capsys, *arguments: str) -> str:
    """The one line of a command that does not start."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_an_imported_name_that_is_gone(capsys, monkeypatch):
    monkeypatch.delattr(optimizer, "default_adamw")
    said = doctor(capsys, FLAVOR)
    assert "BROKEN torchtitan.components.optimizer:default_adamw: " in said
    assert "This means: no flavor and no job can be trained" in said
    assert " 1 broken" in said
    assert "torchtitan.components.optimizer:default_adamw: " in refusal(
        capsys, "show", FLAVOR, "--all"
    )


def test_what_the_host_remarks_on_the_config_that_is_tried_is_not_in_the_report(capsys, caplog):
    assert cli.main(["doctor", "--all"]) == 0
    assert " holds the config of debugmodel_sdpa" in " ".join(capsys.readouterr().out.split())
    assert caplog.text == ""


@pytest.fixture
def _another_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line holds, and not one flavor builds."""

    def build_mla_moe_layers(
        *, novel, moe_hidden_dim, num_experts, router_top_k, rope, attn_backend, **more
    ):
        raise AssertionError("is called without `novel`")

    monkeypatch.setattr(deepseek_v3, "build_mla_moe_layers", build_mla_moe_layers)


@pytest.mark.usefixtures("_another_signature")
def test_a_model_that_is_no_longer_built(capsys):
    said = doctor(capsys)
    assert "BROKEN the model of debugmodel_sdpa: " in said
    assert "TypeError: " in said
    assert "missing 1 required keyword-only argument: 'novel'" in said
    assert " holds torchtitan.models.deepseek_v3:build_mla_moe_layers" in said
    assert " 1 broken" in said


@pytest.mark.usefixtures("_another_signature")
@pytest.mark.parametrize("command", [("describe", FLAVOR), ("show", FLAVOR, "--all")])
def test_a_command_that_builds_a_model_says_why_it_cannot(capsys, command):
    assert "required keyword-only argument: 'novel'" in refusal(capsys, *command)


def test_a_part_of_the_binding_that_cannot_be_imported(capsys, monkeypatch):
    """Its own line, and the rest of the report."""
    module = "ezpz_moe.hosts.titan.settings"
    monkeypatch.setitem(sys.modules, module, None)
    said = doctor(capsys)
    assert f"BROKEN {module}: ModuleNotFoundError: " in said
    assert " holds the model of debugmodel_sdpa" in said
    assert " holds the config of debugmodel_sdpa" in said
    assert " 1 broken" in said
    with pytest.raises(EzpzError, match=r"cannot do this with torchtitan .*ModuleNotFoundError"):
        detect.host().settings(None)


def test_a_config_that_is_no_longer_made(capsys, monkeypatch):
    def trainer_config(job, host_flags=()):
        raise TypeError("novel")

    monkeypatch.setattr(job, "trainer_config", trainer_config)
    said = doctor(capsys)
    assert "BROKEN the config of debugmodel_sdpa: TypeError: novel" in said
    assert " 1 broken" in said


def test_one_model_of_the_hosts_that_is_no_longer_built(capsys, monkeypatch):
    def summarize(flavor):
        raise RuntimeError("of two\n  lines")

    monkeypatch.setattr(parameters, "summarize", summarize)
    said = doctor(capsys, FLAVOR)
    assert "BROKEN debugmodel_sdpa: RuntimeError: of two lines" in said
    assert " 1 broken" in said


def test_a_host_that_cannot_be_told_its_device(capsys, monkeypatch):
    """Every line holds, but there would be no training here."""

    def import_host_on_cpu():
        raise AttributeError("module 'torch.cpu' has no attribute 'novel'")

    monkeypatch.setattr(cpu, "no_accelerator", lambda: True)
    monkeypatch.setattr(cpu, "import_host_on_cpu", import_host_on_cpu)
    detect.host.cache_clear()
    said = doctor(capsys)
    assert "BROKEN the host: ezpz_moe cannot work with torch" in said
    assert "choosing its device: AttributeError: module 'torch.cpu' has no attribute" in said
    assert "choosing its device: AttributeError" in refusal(capsys, "show", FLAVOR, "--all")


def test_files_that_cannot_be_read_tell_no_generation(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_host"
    package.mkdir()
    (package / "__init__.py").touch()
    evidence = Reliance("some_host.config:derive", used_for="x", if_broken="x")
    assert not is_written(evidence)
    for content, written in ((b"def derive(", False), (b"\0", False), (b"def derive(): 0", True)):
        (package / "config.py").write_bytes(content)
        assert is_written(evidence) == written


# --- hosts that cannot be imported, before the installed one ------------------------------------

NO_HOST = "import sys; sys.modules['torchtitan'] = None\n"
MAIN = "import sys\nfrom ezpz_moe.cli import main\nsys.exit(main(sys.argv[1:]))\n"


def run(path: Path, *arguments: str, script: str = MAIN) -> subprocess.CompletedProcess[str]:
    """A command where imports look into ``path`` first, on a machine without an accelerator."""
    root = Path(hosts.__file__).parent.parent.parent
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"PYTHONPATH": f"{path}:{root}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "No module named 'torchtitan.tools'"),
        *(
            pytest.param(content, reason, marks=pytest.mark.full)
            for content, reason in (
                ("import no_such_package", "No module named 'no_such_package'"),
                ("raise RuntimeError('torch is too old')", "RuntimeError: torch is too old"),
            )
        ),
        ("def broken(", "SyntaxError: '(' was never closed"),
    ],
)
def test_a_host_that_cannot_be_imported(tmp_path, content, reason):
    """Its files still tell its generation."""
    (tmp_path / "torchtitan" / "config").mkdir(parents=True)
    (tmp_path / "torchtitan" / "__init__.py").write_text(content)
    evidence = "class TrainingConfig:\n    max_context_length: int\n"
    (tmp_path / "torchtitan" / "config" / "configs.py").write_text(evidence)
    done = run(tmp_path, "doctor", FLAVOR)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert reason in done.stdout
    assert "none: ezpz_moe cannot work with torch" in done.stdout
    assert "BROKEN torchtitan.components.data:GrainDataLoader.Config: " in done.stdout
    assert "BROKEN torchtitan.tools.utils:device_type: " in done.stdout
    assert " broken.\n" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("doctor",),
        pytest.param(("describe", FLAVOR), marks=pytest.mark.full),
        pytest.param(("show", FLAVOR), marks=pytest.mark.full),
        ("train", FLAVOR),
    ],
)
def test_a_host_that_is_not_installed(tmp_path, command):
    (tmp_path / "sitecustomize.py").write_text(NO_HOST)  # for the workers of `train` too
    done = run(tmp_path, *command)
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert "and torchtitan not installed: " in done.stderr
    assert "Install with: pip install" in done.stderr
